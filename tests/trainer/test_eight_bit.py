"""`train.moments = "8bit"`: what bitsandbytes' optimizer trains, saves and takes, alone and by two ranks."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from streamsyn.config.command_sections import TrainSection
from streamsyn.trainer.commands import Ranks as Group
from streamsyn.trainer.model.optimizer import make_optimizer, moment_bytes, parked_moments
from streamsyn.trainer.model.placed import Placed
from streamsyn.trainer.saving.checkpoint import Checkpoints
from streamsyn.trainer.saving.store import Store
from tests.trainer import tiny
from tests.trainer.by_hand import fresh, placed_model, plans, section, train, weights
from tests.trainer.conftest import lines
from tests.trainer.rank_runs import Ranks, said

pytest.importorskip("bitsandbytes", reason="the extra 8bit is not installed")

STEPS = 8


def write_wide(folder: Path, **given: Any) -> Path:
    """A model whose matrices are large enough for moments of 8 bits, and can be divided by two."""
    width: dict[str, Any] = {"vocab_size": 272, "hidden_size": 64, "intermediate_size": 128}
    tiny.model(**width | given, num_key_value_heads=4).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def newest(out: Path) -> Path:
    """The folder of the newest checkpoint."""
    return out / "checkpoints" / (out / "LATEST").read_text().strip()


def same_samples(steps: int) -> list[Any]:
    """Steps over the same samples, which a model learns."""
    step, end = plans(1)
    return [*[step] * steps, end]


def test_losses_are_those_of_float32(tmp_path: Path) -> None:
    """Each within 0.1 %, the weights within a twentieth of what the training changes in them."""
    base, losses, ends = write_wide(tmp_path / "base"), [], []
    for kind in ("fp32", "8bit"):
        out = tmp_path / kind
        out.mkdir()
        settings = section(moments=kind, learning_rate=0.003)
        ends.append(weights(train(out, settings, same_samples(STEPS), base=base)[2]))
        losses.append([line["loss"] for line in lines(out)])
    first = tiny.model_weights(base)
    moved, differ = (
        sum(float((ends[0][name] - one).norm() ** 2) for name, one in other.items()) ** 0.5
        for other in (first, ends[1])
    )

    assert losses[0][-1] < losses[0][0] - 1
    assert pytest.approx(losses[0], rel=1e-3) == losses[1]
    assert 0 < differ < moved / 20


@pytest.mark.parametrize("offload", [False, True])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Path, *, offload: bool) -> None:
    """Weights and all that the optimizer keeps, numbers of steps too."""
    settings = section(moments="8bit", optimizer_offload=offload)
    base = write_wide(tmp_path / "base")
    with fresh():
        whole, resumed = (placed_model(base, settings) for _ in range(2))
    store = Store(tmp_path, settings, tiny.tokenizer(), Group(0, 1))
    Checkpoints(tmp_path, 2).prepare()
    make_steps(whole, settings, range(3))
    store.save(whole, 3)
    store.settle()
    found = Checkpoints(tmp_path, 2).newest()
    assert found is not None
    store.restore(resumed, found)
    for one in (whole, resumed):
        make_steps(one, settings, range(3, 6))

    assert tiny.furthest(weights(whole), weights(resumed)) == 0
    assert tiny.furthest(kept(whole), kept(resumed)) == 0
    assert {6} == {int(one) for name, one in kept(resumed).items() if name.startswith("step.")}


def make_steps(placed: Placed, settings: TrainSection, numbers: range) -> None:
    """Change all weights, by the same gradients for the same numbers."""
    for number in numbers:
        with parked_moments(placed.optimizer, settings):
            for one in placed.plain.parameters():
                one.grad = torch.sin(torch.arange(one.numel()) + number).view_as(one)
        placed.optimizer.step()


def kept(placed: Placed) -> dict[str, torch.Tensor]:
    """What the optimizer keeps, codes as numbers that can be subtracted."""
    return {
        f"{kind}.{name}": torch.as_tensor(value).double()
        for name, one in placed.plain.named_parameters()
        for kind, value in placed.optimizer.state[one].items()
    }


def _bytes(state: dict[str, Any]) -> int:
    """Of moments and scales, without the table of codes that all weights share."""
    return sum(one.nbytes for kind, one in state.items() if kind not in ("step", "qmap1", "qmap2"))


def test_moments_take_two_bytes() -> None:
    """And scales 8 more for each 256 weights; those of norms and biases are float32."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.LayerNorm(8192))
    settings = section(moments="8bit")
    optimizer = make_optimizer(model, settings)
    for one in model.parameters():
        one.grad = torch.ones_like(one)
    optimizer.step()
    sizes = {
        name: sum(
            value.nbytes for kind, value in optimizer.state[one].items() if kind[:4] in ("stat", "absm")
        )
        / one.numel()
        for name, one in model.named_parameters()
    }

    assert {"0.weight": 2 + 8 / 256, "0.bias": 8, "1.weight": 8, "1.bias": 8} == sizes
    assert 2 == moment_bytes(settings)


def test_two_ranks_train_their_shards(ranks: Ranks, tmp_path: Path) -> None:
    """FSDP2, from the checkpoint of one process, to what that process ends with: weights within 1e-5, codes
    of moments but for one in a hundred, as sums in a different order round differently.
    """
    given: dict[str, Any] = {"model": write_wide(tmp_path / "base"), "moments": "8bit", "rows_per_step": 4}
    alone = ranks.done(1, tmp_path / "alone", **given, max_steps=2, save_every_steps=1)
    shared = tmp_path / "shared"
    shutil.copytree(alone, shared)
    (shared / "LATEST").write_text("step-0000001\n")
    ranks.done(2, shared, sharded="fsdp2", **given, max_steps=2)

    assert tiny.furthest(*(tiny.saved(newest(out)) for out in (alone, shared))) < 1e-5
    expected, found = (tiny.saved(newest(out), "optimizer") for out in (alone, shared))
    assert expected.keys() == found.keys()
    codes = [name for name, one in expected.items() if getattr(one, "dtype", None) == torch.uint8]
    differ = [float((expected[name] != found[name]).double().mean()) for name in codes]
    assert 2 * 15 == len(codes)
    assert max(differ) < 0.01
    assert {2} == {one for name, one in found.items() if name.startswith("step.")}


@pytest.mark.torture
def test_what_two_ranks_saved_others_read_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    """One process and four ranks."""
    given: dict[str, Any] = {"model": write_wide(tmp_path / "base"), "moments": "8bit", "rows_per_step": 4}
    out = ranks.done(2, tmp_path / "out", sharded="fsdp2", **given, max_steps=2)
    saved = tiny.saved(newest(out), "optimizer")
    for world, kind in ((1, None), (4, "fsdp2")):
        ranks.done(world, out, sharded=kind, **given, max_steps=2)
        again = tiny.saved(newest(out), "optimizer")
        assert saved.keys() == again.keys()
        assert all(torch.equal(torch.as_tensor(saved[name]), torch.as_tensor(again[name])) for name in saved)


def test_blocks_that_ranks_would_share_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    """One line with the weight, the number of ranks, and what else there is."""
    base = write_wide(tmp_path / "base", vocab_size=260)
    codes = ranks.run(2, tmp_path / "out", sharded="fsdp2", model=base, moments="8bit")

    assert [2, 2] == codes
    assert (
        'train.moments = "8bit": model.embed_tokens.weight of 260 x 64 elements cannot be divided into '
        'blocks of 256 by 2 ranks; use "bf16", or a different number of ranks'
    ) in said(tmp_path / "out")
