"""`streamsyn train --plan`: what it adds up, against memory that real tensors take."""

from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from click.testing import CliRunner
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from streamsyn.cli.main import cli
from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.trainer.memory_plan import OTHER_BYTES, memory_plan, pass_bytes
from streamsyn.trainer.model.activations import recompute
from streamsyn.trainer.model.attention import SEGMENTS, VARLEN, implementation
from tests.trainer import tiny
from tests.trainer.by_hand import section

TOKENS = 512


def of_size(attention: str, device: str, settings: TrainSection) -> Any:
    """A model in bf16 whose heads are as wide as kernels want them, on a device."""
    implementation("segments", torch.device("cpu"), half=False)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    config._attn_implementation = attention
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).train()
    recompute(model, settings)
    return model


def allocated(model: Any, degree: int = 1) -> int:
    """The largest sum of memory of real tensors during the same pass, as torch's profiler saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        pass_bytes(model, TOKENS, degree)
    events = profiler.profiler.kineto_results.events()
    moves = sorted((one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]")
    now = peak = 0
    for _, size in moves:
        now += size
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("kind", [False, "selective", True])
def test_a_pass_takes_what_meta_tensors_say(kind: Any) -> None:
    """Within a tenth, with all activations kept, those of attention or those between layers."""
    settings = section(gradient_checkpointing=kind)
    expected = pass_bytes(of_size(VARLEN, "meta", settings), TOKENS).peak

    assert pytest.approx(expected, rel=0.1) == allocated(of_size(SEGMENTS, "cpu", settings))


@pytest.mark.parametrize("kind", [False, True])
def test_ranks_that_share_a_row_take_a_part_of_its_memory(kind: Any) -> None:
    """What the plan says of one of four ranks is what real tensors take, within a sixth, and less than two
    fifths of what a rank alone takes.
    """
    settings = section(gradient_checkpointing=kind)
    alone = pass_bytes(of_size(VARLEN, "meta", settings), TOKENS).peak
    expected = pass_bytes(of_size(VARLEN, "meta", settings), TOKENS, 4).peak

    assert pytest.approx(expected, rel=1 / 6) == allocated(of_size(SEGMENTS, "cpu", settings), 4)
    assert expected < 0.4 * alone


def test_the_plan_counts_ranks_that_share_rows(tmp_path: Path) -> None:
    """The activations of half a row; a number of GPUs that cannot be divided is refused."""
    path = str(write_config(tmp_path))
    whole, half = (
        memory_plan(path, section(seq_len=512, sequence_parallel=degree), 2)[0] for degree in (1, 2)
    )

    assert half.activations < 0.6 * whole.activations
    assert half.weights == whole.weights
    with pytest.raises(ConfigError, match="3 GPUs cannot be divided into groups of 2"):
        memory_plan(path, section(seq_len=512, sequence_parallel=2), 3)


def write_config(folder: Path) -> Path:
    """A directory with a model's configuration, without weights or tokenizer."""
    tiny.model(tie_word_embeddings=False).config.save_pretrained(folder)
    return folder


def test_parts_follow_from_the_number_of_weights(tmp_path: Path) -> None:
    """4 bytes of weight and gradient, 8 of moments, over the GPUs; offloaded moments are on the host."""
    weights = sum(one.numel() for one in tiny.model(tie_word_embeddings=False).parameters())
    needs = memory_plan(str(write_config(tmp_path)), section(seq_len=512), 4)
    plain, parked = needs[0], needs[3]

    assert not any(plain.keys.values())
    assert (weights, weights, 2 * weights) == (plain.weights, plain.gradients, plain.moments)
    sums = (plain.weights, plain.gradients, plain.moments, plain.gathered, plain.activations, OTHER_BYTES)
    assert plain.total == sum(sums)
    assert (0, 2 * weights) == (parked.moments, parked.host)


def test_smaller_moments_are_counted(tmp_path: Path) -> None:
    """4 bytes of both in bf16, which are float32 again for the update, and 2 bytes with 8 bits."""
    path = str(write_config(tmp_path))
    plain, half, eighth = (
        memory_plan(path, section(seq_len=16, moments=kind), 1)[0] for kind in ("fp32", "bf16", "8bit")
    )
    weights = plain.weights // 4

    assert (8 * weights, 4 * weights, 2 * weights) == (plain.moments, half.moments, eighth.moments)
    assert plain.total > half.total > eighth.total == plain.total - 6 * weights


def test_each_key_saves(tmp_path: Path) -> None:
    """In the order of the table; what is offloaded is in host memory."""
    needs = memory_plan(str(write_config(tmp_path)), section(seq_len=512), 2)

    activations = [one.activations for one in needs]
    assert sorted(activations, reverse=True) == activations
    assert activations[0] > activations[1] > activations[2] == activations[3] > activations[4]
    assert needs[4].host > needs[3].host


def test_adapters_need_no_moments_of_frozen_weights(tmp_path: Path) -> None:
    """Only the adapters have gradients and moments."""
    settings = section(seq_len=512, lora={"rank": 4})
    need = memory_plan(str(write_config(tmp_path)), settings, 1)[0]

    assert need.moments == 2 * need.gradients
    assert need.gradients < need.weights / 3


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    """For a directory without weights; a key of the command line is the first column."""
    given = [
        "train",
        "--plan",
        "--model",
        str(write_config(tmp_path)),
        "--gpus",
        "8",
        "--gpu-memory",
        "1.5GB",
    ]
    done = CliRunner().invoke(cli, [*given, "--set", "train.seq_len=8192"])

    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].startswith("GB on each of 8 GPUs of 2 GB: ")
    assert lines[0].endswith("rows of 8,192 tokens")
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:] if line.split()}
    assert ["true", "false", "selective", "true", "true"] == rows["gradient_checkpointing"]
    assert ["no"] * 5 == rows["fits"]
    assert 5 == len(rows["activations"])


def test_the_command_prints_json(tmp_path: Path) -> None:
    """Bytes, and whether they fit; null if the memory of a GPU is not given."""
    given = [
        "train",
        "--plan",
        "--model",
        str(write_config(tmp_path)),
        "--json",
        "--set",
        "train.seq_len=512",
    ]
    plain, sized = (
        orjson.loads(CliRunner().invoke(cli, [*given, *more]).stdout)
        for more in ([], ["--gpu-memory", "80GiB"])
    )

    assert (512, 1, None) == (plain["seq_len"], plain["gpus"], plain["gpu_memory_bytes"])
    assert sized["gpu_memory_bytes"] == 80 * 2**30
    assert {None} == {one["fits"] for one in plain["needs"]}
    assert {True} == {one["fits"] for one in sized["needs"]}
    assert plain["needs"][0]["total_bytes"] > OTHER_BYTES


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "nowhere/at/all"], "nowhere/at/all is not a model"),
        ([], "the model to tune is missing"),
        (["--model", "m", "--gpu-memory", "much"], "invalid size 'much'; expected bytes"),
    ],
)
def test_mistakes_are_one_line(given: list[str], message: str) -> None:
    done = CliRunner().invoke(cli, ["train", "--plan", *given])

    assert done.exit_code != 0
    assert message in f"{done.output}{done.exception}"
