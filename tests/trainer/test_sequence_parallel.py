"""Ranks that share rows (`train.sequence_parallel`) train as one rank does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    MiniMaxConfig,
    Phi3Config,
)

from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.trainer.model.loss import make_batch
from streamsyn.trainer.model.sequence_parallel import SequenceGroup, check_sequence_parallel
from streamsyn.trainer.training import check_shares
from tests.trainer import tiny
from tests.trainer.conftest import lines
from tests.trainer.rank_runs import Ranks
from tests.trainer.test_command import lineage, result

pytestmark = pytest.mark.timeout(180)

STEPS = 3
CPU = torch.device("cpu")


def assert_trained_alike(out: Path, alone: Path) -> None:
    """The same samples and losses at each step (1e-5), and the same weights at the end (1e-5)."""
    found, expected = lineage(out), lineage(alone)
    assert list(range(1, STEPS + 1)) == [step for step, _ in found]
    for (_, examples), (_, others) in zip(found, expected, strict=True):
        ours, theirs = ({tuple(one[:4]): one[4] for one in some} for some in (examples, others))
        assert theirs == pytest.approx(ours, rel=1e-5)
    losses, others = ([line["loss"] for line in lines(one)] for one in (out, alone))
    assert others == pytest.approx(losses, rel=1e-5)
    assert tiny.furthest(result(alone), result(out)) < 1e-5


@pytest.fixture(scope="module")
def alone(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a training by one rank, with evaluations."""
    out = tmp_path_factory.mktemp("alone") / "out"
    return ranks.done(1, out, max_steps=STEPS, holdout=0.2, eval_every_steps=1)


@pytest.mark.parametrize("sharded", [None, pytest.param("fsdp2", marks=pytest.mark.torture)])
def test_ranks_that_share_rows_train_as_one(ranks: Ranks, tmp_path: Path, alone: Path, sharded: Any) -> None:
    """Two ranks with half of each row: the losses of each sample, the weights and what is measured on
    held-out samples are those of one rank with whole rows. A checkpoint is resumed at another degree."""
    out = tmp_path / "out"
    keys: dict[str, Any] = {"holdout": 0.2, "eval_every_steps": 1}
    ranks.done(2, out, max_steps=2, sequence_parallel=2, sharded=sharded, **keys)
    ranks.done(1, out, max_steps=STEPS, sequence_parallel=1, **keys)

    assert_trained_alike(out, alone)
    assert tiny.furthest(ranks.base, result(out)) > 1e-4
    for one, other in zip(lines(out, "evaluation"), lines(alone, "evaluation"), strict=False):
        names = [name for name in one if name.startswith("nll_") and one["held_out"] == other["held_out"]]
        assert {name: one[name] for name in names} == pytest.approx(
            {name: other[name] for name in names}, rel=1e-5, abs=1e-5
        )


@pytest.mark.crash
@pytest.mark.parametrize(
    ("world", "degree", "sharded"),
    [
        (4, 4, None),
        (4, 2, "fsdp2"),
        pytest.param(4, 2, None, marks=pytest.mark.torture),
        pytest.param(4, 4, "fsdp2", marks=pytest.mark.torture),
    ],
)
def test_four_ranks_in_groups(
    ranks: Ranks, tmp_path: Path, alone: Path, world: int, degree: int, sharded: Any
) -> None:
    """Two groups of two, and one of four, which repeats the two key heads; a checkpoint of two ranks that
    share no row is resumed."""
    out = tmp_path / "out"
    keys: dict[str, Any] = {"holdout": 0.2, "eval_every_steps": 1}
    ranks.done(2, out, max_steps=1, **keys)
    ranks.done(world, out, max_steps=STEPS, sequence_parallel=degree, sharded=sharded, **keys)

    assert_trained_alike(out, alone)


def test_heads_that_cannot_be_divided_are_filled_up(ranks: Ranks, tmp_path: Path) -> None:
    """Six heads that share three keys, on four ranks: the losses and weights of one rank."""
    base, keys = tmp_path / "base", {"max_steps": 2}
    made: Any = tiny.model(hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    made.save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    alone = ranks.done(1, tmp_path / "alone", model=base, **keys)
    out = ranks.done(4, tmp_path / "out", model=base, sequence_parallel=4, **keys)

    assert [one["loss"] for one in lines(out)] == pytest.approx([one["loss"] for one in lines(alone)], 1e-5)
    assert tiny.furthest(result(alone), result(out)) < 1e-5


SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONG_ROPE |= {"original_max_position_embeddings": 32, "factor": 2.0}
REFUSED: dict[str, tuple[Any, str]] = {
    "convolution": (Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]), "conv, convolution"),
    "recurrent": (JambaConfig(**SIZES, attn_layer_offset=1, attn_layer_period=2), "convolution, .*recurrent"),
    "linear": (
        MiniMaxConfig(**SIZES, num_local_experts=2, layer_types=["linear_attention", "full_attention"]),
        "linear_attention",
    ),
    "rotary": (Phi3Config(**SIZES, max_position_embeddings=64, rope_parameters=LONG_ROPE), "longrope"),
    "not our attention": (LlamaConfig(**SIZES), "its logits differ by"),
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_models_whose_rows_cannot_be_divided_are_refused(kind: str) -> None:
    """By their layers, or because the second half of a row has different logits without the first."""
    config, message = REFUSED[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(ConfigError, match=f"^train.sequence_parallel: .*{message}.*; use 1$"):
        check_sequence_parallel(model, model, SequenceGroup(2, 1), CPU, half=False)


def test_a_row_is_divided_without_a_rest() -> None:
    """Each token and each target is on one rank of four; the row is filled up to a multiple of four."""
    row = (tiny.example(14, 5), tiny.example(9, 9 - 1, seed=1))
    whole = make_batch(row, [0.5, 0.25], CPU)
    parts = [SequenceGroup(4, place).share(whole) for place in range(4)]

    assert (0, 14, 23, 24) == parts[0].bounds
    assert [6] * 4 == [part.input_ids.shape[1] for part in parts]
    joined = torch.cat([part.input_ids[0] for part in parts])
    assert torch.equal(whole.input_ids[0], joined[:23])
    assert [*range(14), *range(9), 0] == torch.cat([part.position_ids[0] for part in parts]).tolist()
    at = torch.cat([part.at + 6 * place for place, part in enumerate(parts)])
    assert torch.equal(whole.at, at)
    assert 0 == len(parts[0].at)
    for name in ("labels", "weights", "owner"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


@pytest.mark.parametrize(
    ("world", "given", "message"),
    [
        (3, {"sequence_parallel": 2}, r"sequence_parallel: 3 ranks .* groups of 2; start a multiple of 2"),
        (
            8,
            {"sequence_parallel": 2, "rows_per_step": 6},
            "6 rows .* 4 groups of 2 ranks; use a multiple of 4",
        ),
        (4, {"rows_per_step": 6}, "6 rows cannot be divided among 4 ranks; use a multiple of 4"),
    ],
)
def test_ranks_and_rows_that_cannot_be_divided_are_refused(
    world: int, given: dict[str, Any], message: str
) -> None:
    """In words that name a number that would do."""
    with pytest.raises(ConfigError, match=message):
        check_shares(TrainSection.model_validate(given), world)


def test_fewer_rows_than_ranks_will_do() -> None:
    """Eight ranks in two groups of four need rows for two."""
    check_shares(TrainSection.model_validate({"sequence_parallel": 4, "rows_per_step": 2}), 8)
