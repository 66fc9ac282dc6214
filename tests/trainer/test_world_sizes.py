"""A training that resumes with a different number of ranks."""

import sys
from pathlib import Path

import pytest

from tests.trainer import tiny
from tests.trainer.test_command import SETTINGS, lineage, result, write_run
from tests.trainer.test_loop import run_ranks

# Four trainings, each a process or two that import torch.
pytestmark = [pytest.mark.crash, pytest.mark.timeout(180)]


def test_the_number_of_ranks_may_change_between_runs(tmp_path: Path) -> None:
    """Two steps by one rank, two by two ranks, the rest by one: each step has the samples of a training by
    one rank alone, and the weights are equal up to rounding."""
    tiny.write_model(tmp_path / "base")
    run, out, alone = write_run(tmp_path / "run", range(40)), tmp_path / "out", tmp_path / "alone"

    def go_on(world: int, where: Path, **more: object) -> None:
        keys = {
            **SETTINGS,
            "train.max_wait_s": 60,
            **{f"train.{name}": value for name, value in more.items()},
        }
        sets = [part for name, value in keys.items() for part in ("--set", f"{name}={value}")]
        given = ["--from", str(run), "--model", str(tmp_path / "base"), "--out", str(where)]
        run_ranks([sys.executable, "-m", "streamsyn", "train", *given, *sets], world)

    go_on(1, alone)
    go_on(1, out, max_steps=2)
    go_on(2, out, max_steps=4)
    go_on(1, out)

    found, expected = lineage(out), lineage(alone)
    assert len(expected) > 5
    assert [step for step, _ in expected] == [step for step, _ in found]
    for (_, examples), (_, others) in zip(found, expected, strict=True):
        assert sorted(one[:4] for one in examples) == sorted(one[:4] for one in others)
    assert tiny.furthest(result(alone), result(out)) < 1e-5
