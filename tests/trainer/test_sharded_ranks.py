"""Several ranks save while they train: one that cannot write, and a different number of ranks afterwards."""

from pathlib import Path
from typing import Any

import pytest

from tests.trainer import tiny
from tests.trainer.conftest import lines
from tests.trainer.rank_runs import Ranks, said
from tests.trainer.sharding import Kind

pytestmark = pytest.mark.timeout(300)


def newest(out: Path) -> Path:
    """The folder of the newest checkpoint."""
    return out / "checkpoints" / (out / "LATEST").read_text().strip()


@pytest.mark.parametrize("kind", [pytest.param(None, marks=pytest.mark.torture), "fsdp2"])
def test_a_rank_that_cannot_write_ends_the_training(ranks: Ranks, tmp_path: Path, kind: Kind | None) -> None:
    """One line on rank 0 that names the rank; no rank hangs, and the checkpoint before stays."""
    out = ranks.done(2, tmp_path / "out", sharded=kind, max_steps=2)
    codes = ranks.run(2, out, sharded=kind, full=1, save_every_steps=1)

    assert [1, 0] == codes, said(out)
    last = (tmp_path / "out.said0").read_text().splitlines()[-1]
    target = out / "checkpoints" / "step-0000003"
    assert (
        f"streamsyn: cannot write {target} on rank 1: File too large; what was saved before it is whole"
        == last
    )
    assert "Traceback" not in said(out)
    assert ["step-0000002"] == [path.name for path in (out / "checkpoints").iterdir()]
    assert "end" == lines(out, "end")[-1]["kind"]


def test_a_checkpoint_of_two_ranks_is_read_by_others_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    """Shards of two ranks, whole tensors of one process, shards of four: all weights and moments."""
    out = ranks.done(2, tmp_path / "out", sharded="fsdp2", max_steps=2, rows_per_step=4)
    saved = {part: tiny.saved(newest(out), part) for part in ("model", "optimizer")}
    for world, kind in ((1, None), (4, "fsdp2")):
        ranks.done(world, out, sharded=kind, max_steps=2, rows_per_step=4)

        for part, before in saved.items():
            assert tiny.furthest(before, tiny.saved(newest(out), part)) == 0
    assert 3 == len(saved["optimizer"]) / (len(saved["model"]))


def test_the_head_is_applied_in_pieces_where_it_is_sharded(ranks: Ranks, tmp_path: Path) -> None:
    """Two ranks with FSDP2 and pieces of three targets train what one process does at once (1e-5)."""
    given: dict[str, Any] = {"max_steps": 2, "rows_per_step": 4}
    alone = ranks.done(1, tmp_path / "alone", **given)
    pieces = ranks.done(2, tmp_path / "pieces", sharded="fsdp2", piece=3, **given)

    assert "train.whole_logits" not in said(pieces)
    assert tiny.furthest(*(tiny.saved(newest(out)) for out in (alone, pieces))) < 1e-5
    assert tiny.furthest(tiny.saved(newest(alone)), ranks.base) > 1e-4
