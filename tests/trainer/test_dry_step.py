"""The dry step: it changes nothing, and finds out at the start that memory is short."""

from pathlib import Path
from typing import Any

import pytest
import torch

from streamsyn.trainer import dry_step as dry
from streamsyn.trainer.loop import Loop
from streamsyn.trainer.model.placed import Placed
from tests.trainer.by_hand import plans, section, train, weights
from tests.trainer.conftest import Start
from tests.trainer.test_command import write_run

pytestmark = pytest.mark.timeout(300)

STEPS = 3


def rehearse(loop: Loop, _placed: Placed) -> None:
    loop.rehearse()


@pytest.mark.parametrize("given", [{}, {"lora": {"rank": 4}}, {"moments": "bf16", "optimizer_offload": True}])
def test_a_training_after_it_is_the_same(tmp_path: Path, given: dict[str, Any]) -> None:
    """To the bit: weights, moments, losses, and the random numbers that follow it."""
    ends = []
    for name, before in (("without", None), ("with", rehearse)):
        out = tmp_path / name
        out.mkdir()
        torch.manual_seed(1)
        loop, _, placed = train(out, section(**given), plans(STEPS), before=before)
        moments = [one for state in placed.optimizer.state.values() for one in state.values()]
        ends.append([*weights(placed).values(), *moments, torch.tensor(loop.progress.losses)])

    assert len(ends[0]) == len(ends[1])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_random_numbers_and_buffers_are_unchanged(tmp_path: Path) -> None:
    """And no gradient is left: a model that notes what it sees, with dropout."""
    loop, _, placed = train(tmp_path, section(), plans(1))
    layer = placed.plain.model.layers[0]
    layer.register_buffer("seen", torch.zeros(1))

    def note(*_: object) -> None:
        layer.seen.add_(torch.rand(1))

    layer.register_forward_hook(note)
    before = torch.get_rng_state()
    loop.rehearse()

    assert torch.equal(before, torch.get_rng_state())
    assert float(layer.seen) == 0
    assert all(one.grad is None for one in placed.plain.parameters())


def test_its_row_is_the_largest() -> None:
    """As long as a row may be, with as many targets."""
    row = dry.largest_row(100)

    assert (100, 99) == (row.length, row.target_tokens)


def test_short_memory_is_found_before_the_stream_is_read(start: Start, tmp_path: Path) -> None:
    """Exit code 2, one line with keys that would help, and no step."""
    run = write_run(tmp_path / "run", range(12))
    made = start(run, tmp_path / "out", seq_len=2**40, holdout=0)

    assert made.wait() == 2
    said = made.stderr().splitlines()[-1]
    assert said.startswith("streamsyn: out of memory, with rows of train.seq_len = 1099511627776 tokens")
    assert "train.optimizer_offload = true" in said
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
