"""What signals do to a trainer, with a clock of the test's own."""

import subprocess
import sys

import pytest

PROGRAM = """
import signal, sys
from streamsyn.trainer.signals import END_OF_RUN, stop_on_signals

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
times = iter(float(arg.split(":")[-1]) for arg in sys.argv[1:])
with stop_on_signals(lambda: print("stop", flush=True), lambda: next(times)):
    for arg in sys.argv[1:]:
        kind = arg.split(":")[0]
        signal.raise_signal({"run": END_OF_RUN, "hup": signal.SIGHUP}.get(kind, signal.SIGTERM))
print("saved")
"""


@pytest.mark.parametrize(
    ("times", "code", "stdout"),
    [
        (["5"], 0, "stop\nsaved\n"),
        (["5", "5.2", "5.9"], 0, "stop\nsaved\n"),
        (["5", "5.2", "7"], 75, "stop\n"),
        (["hup:5", "hup:7"], 0, "stop\nsaved\n"),
        (["run:5"], 0, "stop\nsaved\n"),
        (["5", "run:7"], 0, "stop\nsaved\n"),
        (["run:5", "run:7", "9"], 75, "stop\n"),
    ],
)
def test_a_signal_that_is_forwarded_is_the_same_signal(times: list[str], code: int, stdout: str) -> None:
    """The processes of a service get a SIGTERM each, and their launcher forwards one more. The end of the run
    may follow at any time. Neither costs a step.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *times], capture_output=True, text=True, check=False, timeout=30
    )

    assert (code, stdout) == (done.returncode, done.stdout), done.stderr
