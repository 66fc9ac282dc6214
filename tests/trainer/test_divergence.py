"""A training whose gradients are not finite: logged, and stopped before it spoils what is saved."""

from collections.abc import Callable, Collection
from math import inf, nan
from pathlib import Path

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from streamsyn.errors import TrainingFailed
from streamsyn.trainer.controller import MAX_SKIPPED
from streamsyn.trainer.loop import Loop
from streamsyn.trainer.model.placed import Placed
from tests.trainer.by_hand import plans, section, train
from tests.trainer.conftest import Start, lines
from tests.trainer.test_command import write_run

pytestmark = pytest.mark.timeout(300)


def spoilt(steps: Collection[int]) -> Callable[[Loop, Placed], None]:
    """Makes the gradients of these steps, counted from 1, not a number."""

    def before(loop: Loop, placed: Placed) -> None:
        weight = next(placed.plain.parameters())
        weight.register_hook(lambda found: found * nan if loop.progress.step + 1 in steps else found)

    return before


def saved(out: Path) -> list[str]:
    """The names of the checkpoints."""
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_a_training_that_diverges_is_stopped(tmp_path: Path) -> None:
    """Warnings at 1, 2, 4, ... skipped steps in a row; then it ends, and checkpoints from before stay."""
    settings = section(save_every_steps=2)
    moves = plans(MAX_SKIPPED + 10)
    with capture_logs() as logged, pytest.raises(TrainingFailed) as raised:
        train(tmp_path, settings, moves, before=spoilt(range(6, 100)))

    warnings = [one for one in logged if one["event"] == "train.step_skipped"]
    assert [(6, 1), (7, 2), (9, 4), (13, 8), (21, 16)] == [(one["step"], one["in_a_row"]) for one in warnings]
    assert {"warning"} == {one["log_level"] for one in warnings}
    assert ["step-0000002", "step-0000004"] == saved(tmp_path)
    assert not (tmp_path / "model").exists()
    message = str(raised.value)
    assert f"at {MAX_SKIPPED} steps in a row, up to step {5 + MAX_SKIPPED}, " in message
    assert "checkpoints/step-0000004 is from before them" in message
    assert MAX_SKIPPED + 5 == lines(tmp_path)[-1]["step"]


def test_a_stop_while_diverging_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """Also if only one checkpoint is kept."""

    def spoilt_and_stopped(loop: Loop, placed: Placed) -> None:
        def stop_at_8(_: object) -> None:
            if loop.progress.step + 1 == 8:
                loop.stop()

        spoilt(range(6, 100))(loop, placed)
        next(placed.plain.parameters()).register_hook(stop_at_8)

    settings = section(save_every_steps=2, keep_checkpoints=1)
    loop, controller, _ = train(tmp_path, settings, plans(20), before=spoilt_and_stopped)

    assert controller is not None
    assert "a signal" == controller.why
    assert 8 == loop.progress.step
    assert ["step-0000004"] == saved(tmp_path)


def test_steps_that_are_skipped_now_and_then_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An applied step resets the count; a checkpoint that was due is written after it."""
    monkeypatch.setattr("streamsyn.trainer.controller.MAX_SKIPPED", 3)
    settings = section(save_every_steps=3, keep_checkpoints=9)
    loop, controller, _ = train(tmp_path, settings, plans(8), before=spoilt({2, 3, 5, 6, 8}))

    assert 5 == loop.progress.skipped
    assert controller is not None
    assert controller.stopped is None
    assert ["step-0000004", "step-0000007", "step-0000008"] == saved(tmp_path)
    assert (tmp_path / "model").exists()


def test_a_training_that_diverges_ends_with_1(start: Start, tmp_path: Path) -> None:
    """One line with what to try; the same command starts over, and ends the same."""
    run, out = write_run(tmp_path / "run", range(40)), tmp_path / "out"
    given = {"learning_rate": 1e30, "warmup_steps": 0, "epochs": 6, "save_every_steps": 2}
    for _ in range(2):
        training = start(run, out, **given)

        assert 1 == training.wait(), training.stderr()
        assert [*range(1, MAX_SKIPPED + 2)] == [line["step"] for line in lines(out)]
        assert lines(out, "end")[-1]["why"].startswith("the training has diverged: ")
        last = training.stderr().splitlines()[-1]
        assert last.startswith("streamsyn: the training has diverged: ")
        assert "there is no checkpoint yet; try a lower train.learning_rate" in last
        assert "Traceback" not in training.stderr()
    assert [] == saved(out)
    assert not (out / "model").exists()


def test_a_later_run_counts_anew(tmp_path: Path) -> None:
    """Steps skipped before a checkpoint are in its totals, and do not count to a row of them."""

    def resumed(loop: Loop, placed: Placed) -> None:
        loop.progress.step = loop.progress.skipped = MAX_SKIPPED - 1
        spoilt(range(100))(loop, placed)

    with capture_logs() as logged:
        loop, _, _ = train(tmp_path, section(), plans(3), before=resumed)

    assert MAX_SKIPPED + 2 == loop.progress.skipped
    assert [1, 2] == [one["in_a_row"] for one in logged if one["event"] == "train.step_skipped"]


@pytest.mark.parametrize("key", ["weight_decay", "learning_rate", "max_grad_norm", "stall_s", "max_wait_s"])
def test_numbers_are_finite(key: str) -> None:
    """Infinite ones would spoil the weights, or cannot be written into train.json."""
    with pytest.raises(ValidationError, match="finite"):
        section(**{key: inf})
