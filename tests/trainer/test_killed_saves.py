"""SIGKILL of all ranks, or of one, in the middle of asynchronous saves, and a resume by the same number of
ranks or by another.

In `make torture`, each of the five configurations gets a fifth of STREAMSYN_KILLS.
"""

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import tiny
from tests.trainer.rank_runs import Ranks, said
from tests.trainer.sharding import Kind
from tests.trainer.test_command import result, same, saved

KILLS = max(2, int(os.environ.get("STREAMSYN_KILLS", "0")) // 5)
SEED = int(os.environ.get("STREAMSYN_KILLS_SEED", "0"))
STEPS = 4 * KILLS
EVENTS = 60
"""About as many audit events has rank 0 from the beginning of a save to its end."""

pytestmark = [pytest.mark.crash, pytest.mark.timeout(120 + 60 * KILLS)]


def state(out: Path, step: int) -> dict[str, torch.Tensor]:
    """All weights and moments in the checkpoint of a step."""
    folder = out / "checkpoints" / f"step-{step:07d}"
    parts = {part: tiny.saved(folder, part) for part in ("model", "optimizer")}
    return {f"{part}.{name}": one for part, found in parts.items() for name, one in found.items()}


@pytest.mark.parametrize(
    ("world", "others", "degree"),
    [
        (2, 1, 1),
        pytest.param(1, 2, 1, marks=pytest.mark.torture),
        pytest.param(2, 4, 1, marks=pytest.mark.torture),
        pytest.param(4, 2, 1, marks=pytest.mark.torture),
        pytest.param(4, 2, 4, marks=pytest.mark.torture),
    ],
)
def test_a_kill_in_the_middle_of_a_save_changes_nothing(
    ranks: Ranks, tmp_path: Path, world: int, others: int, degree: int
) -> None:
    """After each kill a checkpoint is whole, and as in an undisturbed training bit for bit, also once another
    number of ranks has read and saved it. The same number of ranks ends with the weights and moments of the
    undisturbed training bit for bit, and another number with the same up to rounding.
    """
    kind: Kind | None = "fsdp2" if world > 1 else None
    keys: dict[str, Any] = {
        "rows_per_step": 4,
        "epochs": STEPS,
        "save_every_steps": 1,
        "keep_checkpoints": STEPS,
        "max_steps": STEPS,
    }
    mine = {**keys, "sharded": kind, "sequence_parallel": degree}
    theirs = {**keys, "sharded": "fsdp2" if others > 1 else None, "sequence_parallel": min(degree, others)}
    whole = ranks.done(world, tmp_path / "whole", **mine)
    rng, out = random.Random(f"{SEED} {world} {others} {degree}"), tmp_path / "out"
    for number in range(KILLS):
        at = saved(out) + rng.randint(1, 3)
        victims = [*range(world)] if number % 2 else [rng.randrange(world)]
        kill = {"ranks": victims, "at": [["os.mkdir", f"step-{at:07d}.tmp"]], "after": rng.randrange(EVENTS)}
        codes = ranks.run(world, out, kill, **mine)

        assert {-signal.SIGKILL} == {codes[one] for one in victims}, said(out)
        assert 0 not in codes
        assert at - 1 <= saved(out)
        copied = tmp_path / f"copied-{number}"
        shutil.copytree(out, copied)
        if number:
            ranks.done(others, copied, **{**theirs, "max_steps": saved(out)})
            assert same(state(whole, saved(out)), state(copied, saved(out)))
    ranks.done(others, tmp_path / "copied-0", **theirs)
    ranks.done(world, out, **mine)
    assert same(state(whole, STEPS), state(out, STEPS))
    assert same(result(whole), result(out))
    assert tiny.furthest(result(whole), result(tmp_path / "copied-0")) < 1e-5
