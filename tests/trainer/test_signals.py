"""What signals do to a trainer, with a clock of the test's own."""

import subprocess
import sys

import pytest

PROGRAM = """
import signal, sys
from streamsyn.trainer.signals import stop_on_signals

times = iter(map(float, sys.argv[1:]))
with stop_on_signals(lambda: print("stop", flush=True), lambda: next(times)):
    for _ in sys.argv[1:]:
        signal.raise_signal(signal.SIGTERM)
print("saved")
"""


@pytest.mark.parametrize(
    ("times", "code", "said"),
    [
        (["5"], 0, "stop\nsaved\n"),
        (["5", "5.2", "5.9"], 0, "stop\nsaved\n"),
        (["5", "5.2", "7"], 75, "stop\n"),
    ],
)
def test_what_a_launcher_passes_on_is_the_same_signal(times: list[str], code: int, said: str) -> None:
    """Processes of a service get a SIGTERM each, and their launcher's too: nobody wants to lose steps."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *times], capture_output=True, text=True, check=False, timeout=30
    )

    assert (code, said) == (done.returncode, done.stdout), done.stderr
