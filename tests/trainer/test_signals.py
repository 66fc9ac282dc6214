"""What signals do to a trainer, with a clock of the test's own."""

import subprocess
import sys

import pytest

PROGRAM = """
import signal, sys
from streamsyn.trainer.signals import END_OF_RUN, stop_on_signals

times = iter(float(arg.removeprefix("run:")) for arg in sys.argv[1:])
with stop_on_signals(lambda: print("stop", flush=True), lambda: next(times)):
    for arg in sys.argv[1:]:
        signal.raise_signal(END_OF_RUN if arg.startswith("run:") else signal.SIGTERM)
print("saved")
"""


@pytest.mark.parametrize(
    ("times", "code", "said"),
    [
        (["5"], 0, "stop\nsaved\n"),
        (["5", "5.2", "5.9"], 0, "stop\nsaved\n"),
        (["5", "5.2", "7"], 75, "stop\n"),
        (["run:5"], 0, "stop\nsaved\n"),
        (["5", "run:7"], 0, "stop\nsaved\n"),
        (["run:5", "run:7", "9"], 75, "stop\n"),
    ],
)
def test_what_comes_by_two_ways_is_the_same_signal(times: list[str], code: int, said: str) -> None:
    """Processes of a service get a SIGTERM each, and their launcher's too; of a run's end, however late it
    comes behind that, a trainer is told besides. Nobody wants to lose steps.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *times], capture_output=True, text=True, check=False, timeout=30
    )

    assert (code, said) == (done.returncode, done.stdout), done.stderr
