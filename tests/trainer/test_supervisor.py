"""A trainer process that is ended, or cannot be started, at an awkward moment."""

import sys
from pathlib import Path

import pytest

from streamsyn.trainer import supervisor
from streamsyn.trainer.signals import EXIT_STOPPED
from streamsyn.trainer.supervisor import EXIT_FAILED, TrainerProcess, TrainerSupervisor

pytestmark = pytest.mark.timeout(30)

DEAF = (sys.executable, "-c", "import time; time.sleep(1000)")


def test_a_second_signal_ends_a_trainer_that_is_being_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer ignores requests to stop, so waiting for it would never end."""

    class StartedLate(TrainerProcess):
        """The signal comes before the supervisor has the process."""

        def __init__(self, *given: object) -> None:
            super().__init__(*given)  # type: ignore[arg-type]
            kept.end()

    monkeypatch.setattr(supervisor, "TrainerProcess", StartedLate)
    kept = TrainerSupervisor(DEAF, tmp_path, as_json=False)
    kept.start(lambda _why: None)

    assert EXIT_STOPPED == kept.finish(stopped=False)


def test_a_trainer_that_cannot_be_started_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may have no process to give for a while: it is tried again, and in the end reported."""

    def refused(*_given: object, **_more: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("subprocess.Popen", refused)
    kept = TrainerSupervisor(DEAF, tmp_path, as_json=False, pause_s=0.01)
    kept.start(lambda _why: None)

    assert EXIT_FAILED == kept.finish(stopped=False)
    assert "Resource temporarily unavailable" in kept.error
