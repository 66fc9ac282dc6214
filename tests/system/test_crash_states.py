"""Some crash states of each kind of run; `python -m tests.system.crash_states` resumes all of them."""

import subprocess
import sys

import pytest

from tests.system.crash_states import MODES

pytestmark = pytest.mark.crash


@pytest.mark.parametrize("mode", MODES)
def test_crash_states_resume(mode: str) -> None:
    """After a kill or a loss of power each draft has one outcome, and nothing that could be read is lost."""
    options = ["--mode", mode, "--seed", "1", "--sample", "6", "--deep", "1"]
    command = [sys.executable, "-m", "tests.system.crash_states", *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)

    assert 0 == done.returncode, done.stdout + done.stderr
    assert done.stdout.startswith(f"{mode}: 12 states, 0 failed"), done.stdout
