"""Checkpoints are written while the training goes on, each rank what it holds. One process; several ranks:
`test_sharded_ranks`.
"""

import os
import threading
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from streamsyn.errors import SinkError
from streamsyn.trainer.commands import Ranks
from streamsyn.trainer.model.placed import Placed
from streamsyn.trainer.saving import result as result_module
from streamsyn.trainer.saving import store as store_module
from streamsyn.trainer.saving.checkpoint import Checkpoints
from streamsyn.trainer.saving.result import _Files, write_result
from streamsyn.trainer.saving.sharded import _share
from streamsyn.trainer.saving.store import Store
from tests.builders import disk_full_beyond
from tests.trainer import tiny
from tests.trainer.by_hand import fresh, placed_model, section, weights


@pytest.fixture
def placed(tmp_path: Path) -> Placed:
    """A tiny model after two steps, with moments."""
    with fresh():
        made = placed_model(tiny.write_model(tmp_path / "base"), section())
    for _ in range(2):
        make_step(made)
    return made


def make_step(placed: Placed) -> None:
    """Change every weight and moment."""
    for one in placed.plain.parameters():
        one.grad = torch.sin(torch.arange(one.numel())).view_as(one)
    placed.optimizer.step()
    placed.optimizer.zero_grad()


def moments(placed: Placed) -> dict[str, torch.Tensor]:
    """What the optimizer keeps, as it is now."""
    return {
        f"{kind}.{name}": value.clone()
        for name, one in placed.plain.named_parameters()
        for kind, value in placed.optimizer.state[one].items()
    }


def store_in(out: Path, keep: int = 2) -> Store:
    """A store of one process."""
    Checkpoints(out, keep).prepare()
    made = Store(out, section(keep_checkpoints=keep), tiny.tokenizer(), Ranks(0, 1))
    made.stream = {"position": 1}
    return made


def newest(out: Path) -> int | None:
    """The step of the newest checkpoint."""
    found = Checkpoints(out, 2).newest()
    return None if found is None else found.step


@pytest.fixture
def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No checkpoint is begun on disk before the event."""
    event, begin = threading.Event(), Checkpoints.begin

    def begin_later(self: Checkpoints, step: int) -> None:
        event.wait()
        begin(self, step)

    monkeypatch.setattr(Checkpoints, "begin", begin_later)
    return event


def test_the_training_goes_on_while_a_checkpoint_is_written(
    placed: Placed, tmp_path: Path, held_back: threading.Event
) -> None:
    """It holds the weights, moments and stream of its step, whatever has been trained since."""
    store, before = store_in(tmp_path), (weights(placed), moments(placed))
    store.save(placed, 2)
    store.settle(wait=False)
    assert newest(tmp_path) is None
    for _ in range(2):
        make_step(placed)
    store.stream = {"position": 2}
    held_back.set()
    with capture_logs() as logged:
        store.settle()

    assert [("train.saved", 2)] == [(one["event"], one["step"]) for one in logged]
    found = Checkpoints(tmp_path, 2).newest()
    assert found is not None
    assert (2, {"position": 1}) == (found.step, found.stream)
    assert tiny.furthest(before[0], weights(placed)) > 1e-5
    store.restore(placed, found)
    assert tiny.furthest(before[0], weights(placed)) == 0
    assert tiny.furthest(before[1], moments(placed)) == 0


def test_values_that_are_not_tensors_are_kept(placed: Placed, tmp_path: Path) -> None:
    """Some optimizers count their steps in a plain number, and have flags."""
    store, state = store_in(tmp_path), placed.optimizer.state
    given = {
        one: {"step": number, "flag": True, "note": "x", "rate": 0.5}
        for number, one in enumerate(placed.plain.parameters())
    }
    for one, values in given.items():
        state[one].update(values)
    store.save(placed, 2)
    for one in given:
        state[one].update({"step": -1, "flag": False})
    store.settle()
    found = Checkpoints(tmp_path, 2).newest()
    assert found is not None
    state.clear()
    store.restore(placed, found)

    for one, values in given.items():
        assert values == {name: state[one][name] for name in values}


def test_a_save_takes_until_it_is_on_disk(
    placed: Placed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not until the training asks for it, which may be a long step later."""
    store, clock, written = store_in(tmp_path), [0.0], threading.Event()
    monkeypatch.setattr(store_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    store.save(placed, 2)
    assert store._pending is not None
    store._pending.future.add_done_callback(lambda _: written.set())
    written.wait()
    clock[0] = 80.0
    with capture_logs() as logged:
        store.settle()

    assert [0.0] == [one["took_s"] for one in logged]


def test_a_save_waits_for_the_one_before(placed: Placed, tmp_path: Path, held_back: threading.Event) -> None:
    """Both are written, in their order."""
    store = store_in(tmp_path)
    store.save(placed, 2)
    threading.Timer(0.01, held_back.set).start()
    store.save(placed, 3)
    assert 2 == newest(tmp_path)
    store.close()

    assert 3 == newest(tmp_path)


def test_a_full_disk_fails_that_save_alone(placed: Placed, tmp_path: Path) -> None:
    """One line; the checkpoint before is whole, nothing unfinished is left, and the next save works."""
    store = store_in(tmp_path)
    store.save(placed, 2)
    store.settle()
    with disk_full_beyond(50_000):
        store.save(placed, 3)
        with pytest.raises(SinkError) as raised:
            store.settle()

    target = tmp_path / "checkpoints" / "step-0000003"
    assert f"cannot write {target}: File too large; what was saved before it is whole" == str(raised.value)
    assert [] == list(tmp_path.glob("**/*.tmp"))
    assert 2 == newest(tmp_path)
    store.save(placed, 3)
    store.settle()
    assert 3 == newest(tmp_path)


def test_a_failure_after_another_error_is_logged(placed: Placed, tmp_path: Path) -> None:
    """The other error is the one that is raised."""
    store = store_in(tmp_path)
    with disk_full_beyond(50_000):
        store.save(placed, 3)
        with capture_logs() as logged:
            store.close()

    assert ["train.not_saved"] == [one["event"] for one in logged]


@pytest.mark.parametrize("damage", ["weights", "names"])
def test_damaged_state_is_one_line(placed: Placed, tmp_path: Path, damage: str) -> None:
    """With what to do; sizes alone do not show it."""
    store = store_in(tmp_path)
    store.save(placed, 2)
    store.settle()
    state = tmp_path / "checkpoints/step-0000002/state"
    path = next(state.glob("*.distcp")) if damage == "weights" else state / ".metadata"
    path.write_bytes(b"\1" * path.stat().st_size)
    found = Checkpoints(tmp_path, 2).newest()
    assert found is not None

    with pytest.raises(
        SinkError, match=r"step-0000002 cannot be read: .*remove it to resume from the"
    ) as raised:
        store.restore(placed, found)
    assert "\n" not in str(raised.value)


def test_what_all_ranks_hold_is_divided() -> None:
    """Each tensor is saved by one rank, and no rank has much more than another."""
    tensors = {f"w{n}": torch.empty(n + 1) for n in range(20)}
    held: dict[str, Any] = {
        "model": tensors,
        "optimizer": {f"m.{name}": one for name, one in tensors.items()},
    }
    shares = [_share(held, rank, 3) for rank in range(3)]

    names = [[f"{part}.{name}" for part, some in one.items() for name in some] for one in shares]
    every = [f"{part}.{name}" for part, some in held.items() for name in some]
    assert sorted(every) == sorted(chain.from_iterable(names))
    sizes = [sum(one.nbytes for some in share.values() for one in some.values()) for share in shares]
    assert max(sizes) - min(sizes) <= 80


def test_a_result_of_several_files(placed: Placed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model larger than a file has an index, and the same weights."""
    target = tmp_path / "model"
    monkeypatch.setattr(result_module, "FILE_BYTES", 50_000)
    write_result(placed, tiny.tokenizer(), target)

    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)] == files
    assert len(files) > 2
    read = type(placed.plain).from_pretrained(target)
    assert tiny.furthest(weights(placed), {name: one.detach() for name, one in read.named_parameters()}) == 0


def test_weights_are_for_whom_the_umask_allows(tmp_path: Path) -> None:
    """An inference server may run as a different user; safetensors lets only the owner read."""
    before = os.umask(0o027)
    try:
        files = _Files(tmp_path)
        files.add({"weight": torch.zeros(2)})
        files.finish()
    finally:
        os.umask(before)

    assert 0o640 == (tmp_path / "model.safetensors").stat().st_mode & 0o777
