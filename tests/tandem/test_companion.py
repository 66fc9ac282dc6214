"""A companion that is ended at an awkward moment."""

import sys
from pathlib import Path

import pytest

from streamsyn.tandem import companion
from streamsyn.tandem.companion import Companion
from streamsyn.tandem.process import TrainerProcess
from streamsyn.tandem.restarts import EXIT_STOPPED

pytestmark = pytest.mark.timeout(30)

DEAF = (sys.executable, "-c", "import time; time.sleep(1000)")


def test_a_trainer_is_ended_that_was_being_started_when_the_signal_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not listen to being told to stop, so that alone would wait for it forever."""

    class StartedLate(TrainerProcess):
        """The signal comes before anybody knows of it."""

        def __init__(self, *given: object) -> None:
            super().__init__(*given)  # type: ignore[arg-type]
            kept.end()

    monkeypatch.setattr(companion, "TrainerProcess", StartedLate)
    kept = Companion(DEAF, tmp_path, as_json=False)
    kept.start(lambda _why: None)

    assert EXIT_STOPPED == kept.finish(stopped=False)
