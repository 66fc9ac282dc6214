"""Two ranks train as one does: all weights, adapters, sharded weights, published weights, and kills during
publication. Elsewhere: publications of one process (`test_publish`).
"""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config

from streamsyn.simulator.app import RunningSimulator, running
from streamsyn.simulator.settings import SimulatorConfig
from tests.examples import one_in
from tests.trainer import by_hand, tiny
from tests.trainer.conftest import lines
from tests.trainer.rank_runs import KEPT, STEPS, Ranks, publishing, said
from tests.trainer.sharding import Kind
from tests.trainer.test_command import lineage, result
from tests.trainer.test_lineage import planned
from tests.trainer.test_packing_isolation import SLIDING

pytestmark = pytest.mark.timeout(180)

LORA = "{rank = 4, alpha = 16}"
DEAD = "http://127.0.0.1:9"


def name_of(step: int) -> str:
    return f"step_{step}"


def published(out: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights published at a step."""
    return load_file(out / "weights" / name_of(step) / "model.safetensors")


def adapters(out: Path) -> dict[str, torch.Tensor]:
    """The adapters of the newest checkpoint."""
    newest = (out / "LATEST").read_text().strip()
    return tiny.saved(out / "checkpoints" / newest)


def assert_whole(folder: Path) -> None:
    """The directory has a complete model and tokenizer for `from_pretrained`."""
    read: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(read[1].values()), read[1]
    assert AutoTokenizer.from_pretrained(folder).chat_template


def assert_trained_alike(out: Path, alone: Path) -> None:
    """The same samples and losses at each step, and the same weights at the end."""
    found, expected = lineage(out), lineage(alone)
    assert list(range(1, STEPS + 1)) == [step for step, _ in found]
    for (step, examples), (number, others) in zip(found, expected, strict=True):
        assert step == number
        ours, theirs = ({tuple(one[:4]): one[4] for one in some} for some in (examples, others))
        assert theirs == pytest.approx(ours, rel=1e-6)
    losses, others = ([line["loss"] for line in lines(one)] for one in (out, alone))
    assert others == pytest.approx(losses, rel=1e-6)
    assert tiny.furthest(result(alone), result(out)) < 1e-6


def test_two_ranks_equal_one(ranks: Ranks, tmp_path: Path) -> None:
    """The same rows on two processes over gloo: both have the weights of one process; losses, evaluations,
    answers and the examples of each step are equal. A rank without a sample or question takes part.
    """
    alone, both = tmp_path / "alone", tmp_path / "both"
    for folder in (alone, both):
        folder.mkdir()
        tiny.write_model(folder / "base")
    kept = [tiny.example(20, 5, 900 + n) for n in range(3)]
    made = by_hand.train(
        alone, by_hand.section(), by_hand.plans(STEPS), held_out=kept, exam=by_hand.exam(alone)
    )
    expected = by_hand.weights(made[2])
    ranks.by_hand(both, STEPS)

    for rank in (0, 1):
        found = torch.load(both / f"weights-{rank}.pt")
        assert tiny.furthest(expected, found) < 1e-6
    steps, alone_steps = lines(both), lines(alone)
    assert [line["loss"] for line in alone_steps] == pytest.approx([line["loss"] for line in steps], rel=1e-5)
    assert planned(STEPS) == [[one[:4] for one in examples] for _, examples in lineage(both)]
    for (_, examples), (_, others) in zip(lineage(alone), lineage(both), strict=True):
        assert [one[4] for one in examples] == pytest.approx([one[4] for one in others], rel=1e-5)
    measured, alone_measured = lines(both, "evaluation"), lines(alone, "evaluation")
    assert [0, STEPS] == [line["step"] for line in measured]
    for one, other in zip(measured, alone_measured, strict=True):
        assert 3 == one["held_out"]
        assert one["nll_with_context"] == pytest.approx(other["nll_with_context"], rel=1e-5)
        assert {"needle_one", "needle_two", "needles", "longbench_a", "longbench"} < one.keys()
        assert all(one[name] == other[name] for name in one if name.startswith(("needle", "longbench")))
    for name in ("step-0000000.jsonl", f"step-{STEPS:07}.jsonl"):
        answers = (both / "answers" / name).read_bytes()
        assert 5 == len(answers.splitlines())
        assert (alone / "answers" / name).read_bytes() == answers


def test_what_rank_0_refuses_is_one_line(ranks: Ranks, tmp_path: Path) -> None:
    """Only rank 0 sees what is wrong with the data: it reports it, and the others end silently."""
    (tmp_path / "bad.jsonl").write_text("{}\n")
    out = tmp_path / "out"
    codes = ranks.run(2, out, control=tmp_path / "bad.jsonl")

    first, other = ((tmp_path / f"out.said{rank}").read_text() for rank in (0, 1))
    assert [2, 0] == codes, other
    assert first.splitlines()[-1].startswith("streamsyn: train.control: ")
    assert "Traceback" not in first + other


@pytest.mark.crash
def test_the_number_of_ranks_may_change_between_runs(ranks: Ranks, tmp_path: Path) -> None:
    """Two steps by one rank, two by two ranks, the rest by one: each step has the samples of a training by
    one rank alone, and the weights are equal up to rounding."""
    alone, out = ranks.done(1, tmp_path / "alone"), tmp_path / "out"
    for world, steps in ((1, 2), (2, 4), (1, STEPS)):
        ranks.done(world, out, max_steps=steps)

    found, expected = lineage(out), lineage(alone)
    assert list(range(1, STEPS + 1)) == [step for step, _ in expected] == [step for step, _ in found]
    for (_, examples), (_, others) in zip(found, expected, strict=True):
        assert sorted(one[:4] for one in examples) == sorted(one[:4] for one in others)
    assert tiny.furthest(result(alone), result(out)) < 1e-5


@pytest.mark.torture
def test_adapters_resume_at_a_different_number_of_ranks(ranks: Ranks, tmp_path: Path) -> None:
    """One rank resumes a checkpoint of two ranks, and two resume one of one, with unchanged results."""
    out = tmp_path / "out"
    for world, steps in ((2, 2), (1, 4), (2, STEPS)):
        ranks.done(world, out, lora=LORA, max_steps=steps)

    assert_trained_alike(out, ranks.alone(LORA))
    assert tiny.furthest(adapters(ranks.alone(LORA)), adapters(out)) < 1e-6


Seen = list[tuple[str | None, str]]


async def watched(server: RunningSimulator, training: Callable[[], Any]) -> Seen:
    """The sequence of a server's pause modes and weight versions while `training` runs in a thread."""
    weights = server.simulation.weights
    seen: Seen = []
    task = asyncio.get_running_loop().run_in_executor(None, training)
    while True:
        now = (weights.mode, weights.version)
        if not seen or seen[-1] != now:
            seen.append(now)
        if task.done():
            await task
            return seen
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("lora", [None, pytest.param(LORA, marks=pytest.mark.torture)])
async def test_two_ranks_train_and_publish_as_one(ranks: Ranks, tmp_path: Path, lora: str | None) -> None:
    """Losses and weights are equal (1e-6), of the model or of its adapters. Published are complete
    directories, adapters merged, with the tensors that one rank publishes. A server is paused, loads them
    and continues; a dead server delays nothing."""
    out = tmp_path / "out"
    async with running(SimulatorConfig(load_s=0.05)) as server:
        publish = publishing(DEAD, server.url)
        seen = await watched(server, lambda: ranks.done(2, out, lora=lora, publish=publish))
    alone = ranks.alone(lora)

    assert_trained_alike(out, alone)
    if lora is not None:
        assert tiny.furthest(adapters(alone), adapters(out)) < 1e-6
    assert ["LATEST", *map(name_of, KEPT)] == sorted(path.name for path in (out / "weights").iterdir())
    assert f"{name_of(STEPS)}\n" == (out / "weights" / "LATEST").read_text()
    for step in KEPT:
        assert_whole(out / "weights" / name_of(step))
        assert tiny.furthest(published(alone, step), published(out, step)) < 1e-6
    assert tiny.furthest(result(out), published(out, STEPS)) == 0
    assert tiny.furthest(ranks.base, published(out, STEPS)) > 1e-4
    told = [one for one in seen if one != ("retract", name_of(STEPS))]  # which lasts no time
    assert (None, "default") == told[0]
    assert ["retract", None] == [mode for mode, _ in told[-2:]]
    assert name_of(STEPS) == told[-1][1]
    assert str(out / "weights" / name_of(STEPS)) == server.simulation.weights.path
    assert f"server={DEAD}" in said(out)


WRITING = [["open", f"/weights/{name_of(4)}.tmp/tokenizer_config.json"]]  # the weights are there
NAMING = [["os.rename", "/weights/LATEST.new"]] * 2
KILLS = {
    "rank 1 while rank 0 writes": (1, WRITING, [4], 4),
    "rank 0 while it writes": (0, WRITING, [2], 2),
    "rank 0 before LATEST": (0, NAMING, [2, 4], 2),
    "rank 0 while an old one goes": (0, NAMING + [["os.remove", ""]] * 3, [4], 4),
}
"""The rank that is killed, when, the steps published by then, and the step in LATEST."""


@pytest.mark.crash
@pytest.mark.parametrize("moment", one_in(2, list(KILLS)))
def test_a_kill_of_a_rank_leaves_whole_weights(ranks: Ranks, tmp_path: Path, moment: str) -> None:
    """Killed at the second publication: directories without a suffix are complete, LATEST is written after
    them, and the other rank ends too. After a restart the weights are those of an undisturbed training."""
    out, root = tmp_path / "out", tmp_path / "out/weights"
    rank, at, whole, newest = KILLS[moment]
    keys: dict[str, Any] = {"publish": publishing(keep=1), "save_every_steps": 3}
    codes = ranks.run(2, out, {"ranks": [rank], "at": at}, **keys)

    assert -signal.SIGKILL == codes[rank], said(out)
    assert codes[1 - rank] > 0, said(out)
    found = sorted(path for path in root.glob("step_*") if not path.suffix)
    for folder in found:
        assert_whole(folder)
    assert [*map(name_of, whole)] == [path.name for path in found]
    assert f"{name_of(newest)}\n" == (root / "LATEST").read_text()

    ranks.done(2, out, **keys)
    assert ["LATEST", name_of(STEPS)] == sorted(path.name for path in root.iterdir())
    assert f"{name_of(STEPS)}\n" == (root / "LATEST").read_text()
    assert_whole(root / name_of(STEPS))
    assert tiny.furthest(published(ranks.alone(None), STEPS), published(out, STEPS)) < 1e-6


@pytest.mark.torture
def test_sharded_training_equals_one_process(ranks: Ranks, tmp_path: Path) -> None:
    """With evaluations and answers, whose forward passes gather weights without a backward pass."""
    tests = {"lengths": "[512]", "samples": "3", "kinds": '["single"]'}
    more = {
        "seq_len": 1024,
        "holdout": 0.2,
        "eval_every_steps": 1,
        "needles": "{" + ", ".join(f"{name} = {value}" for name, value in tests.items()) + "}",
        "tests_every_steps": 2,
    }
    alone = ranks.done(1, tmp_path / "alone", **more)
    out = ranks.done(2, tmp_path / "out", sharded="fsdp2", publish=publishing(keep=1), **more)

    assert tiny.furthest(result(alone), result(out)) < 1e-5
    assert tiny.furthest(result(out), published(out, 3)) == 0
    answered = sorted(path.name for path in (alone / "answers").iterdir())
    assert ["step-0000000.jsonl", "step-0000002.jsonl", "step-0000003.jsonl"] == answered
    for name in answered:
        assert (alone / "answers" / name).read_bytes() == (out / "answers" / name).read_bytes()
    # At the last step: what is held out at an earlier one depends on how far reading has come.
    one, other = (
        {
            name: value
            for line in lines(training, "evaluation")
            if line["step"] == 3
            for name, value in line.items()
        }
        for training in (out, alone)
    )
    for name in ("step", "held_out", "needles", "nll_with_context", "nll_without_context", "context_gain"):
        assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.torture), "bf16"])
def test_sharded_training_resumes_bit_for_bit(ranks: Ranks, tmp_path: Path, precision: str) -> None:
    """Its own checkpoint restores everything, including the float32 weights behind bf16 ones."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    keys: dict[str, Any] = {"precision": precision, "holdout": 0.2, "eval_every_steps": 1}
    ranks.done(2, whole, sharded="fsdp2", **keys)
    for steps in (3, STEPS):
        ranks.done(2, out, sharded="fsdp2", max_steps=steps, **keys)

    assert tiny.furthest(result(whole), result(out)) == 0


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("fsdp2", LORA),
        pytest.param("fsdp2", None, marks=pytest.mark.torture),
        pytest.param("offload", None, marks=pytest.mark.torture),
    ],
)
def test_checkpoints_are_portable_between_backends(
    ranks: Ranks, tmp_path: Path, kind: Kind, lora: str | None
) -> None:
    """FSDP2, one process, FSDP2 again, DDP: weights and moments carry over."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    keys: dict[str, Any] = {"lora": lora, "rows_per_step": 4, "weight_decay": 0.5}
    ranks.done(1, alone, max_steps=4, **keys)
    for world, sharded, steps in ((2, kind, 1), (1, None, 2), (2, kind, 3), (2, None, 4)):
        ranks.done(world, out, sharded=sharded, max_steps=steps, **keys)

    assert tiny.furthest(result(alone), result(out)) < 1e-5
    if lora is not None:
        assert tiny.furthest(adapters(alone), adapters(out)) < 1e-5


def test_steps_that_are_not_finite_are_skipped_by_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    """And counted: here all after the first, whose learning rate is absurd."""
    out = ranks.done(2, tmp_path / "out", sharded="fsdp2", learning_rate=1e30)

    assert [0, *range(1, STEPS)] == [line["skipped"] for line in lines(out)]
    assert all(torch.isfinite(weight).all() for weight in result(out).values())


@pytest.mark.parametrize("kind", [pytest.param(None, marks=pytest.mark.torture), "fsdp2"])
def test_image_towers_stay_unchanged(ranks: Ranks, tmp_path: Path, kind: Kind | None) -> None:
    """They are frozen, because DDP would wait for their gradients; FSDP2 only wraps layers that exist."""
    base, out, alone = tmp_path / "base", tmp_path / "out", tmp_path / "alone"
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=SLIDING,
        vision_config=tower | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=250,
        boi_token_index=251,
        eoi_token_index=252,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    ranks.done(1, alone, model=base, max_steps=2)
    ranks.done(2, out, model=base, max_steps=2, sharded=kind)

    assert tiny.furthest(result(alone), result(out)) < 1e-5
    before, found = load_file(base / "model.safetensors"), result(out)
    seen = [torch.equal(before[name], found[name]) for name in found if "vision" in name]
    assert seen
    assert all(seen)
    assert tiny.furthest(before, found) > 1e-4


def test_ranks_that_do_not_share_a_folder_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    """Each would write its part of a checkpoint to a different place."""
    codes = ranks.run(2, tmp_path / "out{rank}", max_steps=2)

    assert [2, 2] == codes
    told = (tmp_path / "out{rank}.said0").read_text().splitlines()[-1]
    assert "--out must be one folder" in told
    assert not any("Traceback" in path.read_text() for path in tmp_path.glob("*.said?"))
