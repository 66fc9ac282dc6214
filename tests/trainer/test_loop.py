"""The loop over plans made by hand: what a step does, and that nothing but the samples decides it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.train import gpu_cases, prepare
from benchmarks.train_sides import ours
from streamsyn.errors import SinkError
from streamsyn.trainer.commands import Step
from streamsyn.trainer.examples import End, Idle, StepPlan
from streamsyn.trainer.loop import Loop, Schedule
from streamsyn.trainer.model.loss import make_batch
from streamsyn.trainer.model.placed import Placed
from streamsyn.trainer.saving.checkpoint import Checkpoints
from tests.builders import disk_full_beyond
from tests.trainer import tiny
from tests.trainer.by_hand import fresh, plans, section, train, weights

pytestmark = pytest.mark.timeout(180)

STEPS = 4


def lines(out: Path, kind: str = "step") -> list[dict[str, Any]]:
    """The lines of one kind in metrics.jsonl."""
    found = [orjson.loads(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]
    return [line for line in found if line["kind"] == kind]


def test_a_training_equals_a_plain_loop(tmp_path: Path) -> None:
    """The weights after some steps are those of separate samples, one at a time, with torch's AdamW."""
    loop, controller, placed = train(tmp_path, section(), plans(STEPS))
    plain = tiny.model("eager")
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.001, betas=(0.9, 0.95), weight_decay=0.0)
    for step, plan in enumerate(plans(STEPS)[:-1]):
        assert isinstance(plan, StepPlan)
        samples = list(plan.examples())
        for one in samples:
            ids = torch.from_numpy(one.tokens).long()
            logits = plain(input_ids=ids[None], use_cache=False).logits[0, one.loss_from - 1 : -1]
            (torch.nn.functional.cross_entropy(logits, ids[one.loss_from :]) / len(samples)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        left = STEPS - step
        optimizer.param_groups[0]["lr"] = 0.001 * min((step + 1) / 2, left / STEPS)
        optimizer.step()
        optimizer.zero_grad()

    assert controller is not None
    assert controller.stopped is None
    assert STEPS == loop.progress.step
    expected = {name: one.detach() for name, one in plain.named_parameters()}
    assert tiny.furthest(expected, weights(placed)) < 1e-5


def test_the_benchmark_beside_trl_runs_the_loop(tmp_path: Path) -> None:
    """The dry form of its script for GPUs: all steps, and a loss that falls."""
    case = next(case for case in gpu_cases(dry=True) if case.curve)
    plan = prepare(tmp_path, case)
    with fresh():
        losses, times = ours(tmp_path, plan, "segments")

    assert [case.steps] * 2 == [len(losses), len(times)]
    assert losses[-1] < losses[0]


def test_the_number_of_passes_does_not_matter(tmp_path: Path) -> None:
    """Four rows in four passes, two in two, or all in one: the same weights."""
    results = []
    for rows in (1, 2, 4):
        out = tmp_path / str(rows)
        out.mkdir()
        settings = section(rows_per_step=rows, seq_len=256)
        results.append(weights(train(out, settings, plans(STEPS, rows))[2]))

    assert tiny.furthest(results[0], results[1]) < 1e-6
    assert tiny.furthest(results[0], results[2]) < 1e-6


def test_a_step_that_is_not_finite_is_skipped(tmp_path: Path) -> None:
    """A step whose gradient is not finite changes nothing and is counted; the next one is made."""
    settings = section()
    loop, controller, placed = train(tmp_path, settings, plans(1))
    before = weights(placed)
    row = tuple(plans(2)[0].rows[0])  # type: ignore[union-attr]
    loop.train(Step((row,) * 4, ([float("inf")] * len(row),) * 4, 1.0, 0.001))

    assert 1 == loop.progress.skipped
    assert all(torch.equal(before[name], one) for name, one in weights(placed).items())
    loop.train(Step((row,) * 4, ([1.0] * len(row),) * 4, 1.0, 0.001))
    assert 1 == loop.progress.skipped
    assert tiny.furthest(before, weights(placed)) > 0
    assert controller is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_a_plain_directory(tmp_path: Path, dtype: torch.dtype) -> None:
    """OUT/model is read by from_pretrained, in the model's precision, with tokenizer, template and generation
    configuration, and computes what the trained model computes.
    """
    base = tiny.write_model(tmp_path / "base", dtype)
    placed = train(tmp_path, section(), plans(2), base=base)[2]
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = {name: one.to(dtype) for name, one in weights(placed).items()}

    assert dtype == read.dtype
    assert all(torch.equal(expected[name], one) for name, one in read.named_parameters())
    batch = make_batch((tiny.example(30, 5),), [1.0], torch.device("cpu"))
    ours, theirs = placed.plain(**batch.forward_arguments()), read(input_ids=batch.input_ids)
    assert torch.allclose(
        ours.logits[0], theirs.logits[0, -6:-1].float(), atol=1e-6 if dtype is torch.float32 else 0.02
    )
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    saved = orjson.loads((tmp_path / "model" / "config.json").read_bytes())
    assert str(dtype) == f"torch.{saved['dtype']}"
    assert "streamsyn" not in str(saved)


def test_a_stall_is_waited_out(tmp_path: Path) -> None:
    """With `wait`, a stream that brings nothing for too long is trained on when it comes back."""
    stalled = Idle(1800.0, stalled=True)
    moves = plans(2)
    loop, controller, _ = train(tmp_path, section(), [moves[0], stalled, stalled, *moves[1:]])

    assert controller is not None
    assert (2, None) == (loop.progress.step, controller.stopped)


def test_the_rate_follows_how_full_a_step_is(tmp_path: Path) -> None:
    """A step that a slow stream has filled to a quarter has a quarter of the rate."""
    moves = plans(3)
    moves[1] = replace(step_of(moves[1]), fill=0.25)
    train(tmp_path, section(warmup_steps=0, decay_steps=0), moves)

    assert [0.001, 0.00025, 0.001] == [line["rate"] for line in lines(tmp_path)]
    assert [1.0, 0.25, 1.0] == [line["fill"] for line in lines(tmp_path)]


def test_samples_weigh_the_same_in_steps_of_few_and_of_many(tmp_path: Path) -> None:
    """With twice as many samples in a usual step, a step has half the gradient of its mean loss, which is
    recorded.
    """
    first = step_of(plans(1)[0])
    for name, usual in (("own", None), ("usual", 2.0 * first.count)):
        train(tmp_path / name, section(), [replace(first, usual_count=usual), End({})])
    [own], [usual_one] = lines(tmp_path / "own"), lines(tmp_path / "usual")

    assert pytest.approx(own["loss"]) == usual_one["loss"]
    assert pytest.approx(own["grad_norm"] / 2, rel=1e-4) == usual_one["grad_norm"]


@pytest.mark.parametrize("given", [{"loss": "token"}, {"loss": "sequence", "token_loss_steps": 1}])
def test_tokens_weigh_the_same_in_steps_of_few_and_of_many(tmp_path: Path, given: dict[str, Any]) -> None:
    """With twice as many targets in a usual step, a step has half the gradient of its mean loss."""
    first = step_of(plans(1)[0])
    for name, usual in (("own", None), ("usual", 2.0 * first.target_tokens)):
        plan = replace(first, usual_targets=usual, usual_count=1.0)
        train(tmp_path / name, section(**given), [plan, End({})])
    [own], [usual_one] = lines(tmp_path / "own"), lines(tmp_path / "usual")

    assert pytest.approx(own["loss"]) == usual_one["loss"]
    assert pytest.approx(own["grad_norm"] / 2, rel=1e-4) == usual_one["grad_norm"]


def test_the_first_steps_weigh_tokens_and_later_ones_samples(tmp_path: Path) -> None:
    """The same plan has the loss of `token` in the first steps, and then that of the section."""
    first = step_of(plans(1)[0])
    found = {}
    for name, given in (("both", {"token_loss_steps": 2}), ("token", {"loss": "token"}), ("samples", {})):
        moves = [replace(first, state={"position": at}) for at in range(4)]
        train(tmp_path / name, section(learning_rate=1e-12, **given), [*moves, End({})])
        found[name] = [line["loss"] for line in lines(tmp_path / name)]

    assert pytest.approx(found["token"][:2] + found["samples"][2:]) == found["both"]
    assert found["token"][0] != pytest.approx(found["samples"][0], rel=1e-3)


def test_the_rate_falls_before_the_limit(tmp_path: Path) -> None:
    """Over the last `decay_steps` of `max_steps`; the saved schedule is open again for a higher limit."""
    settings = section(warmup_steps=0, decay_steps=3, max_steps=4)
    moves = [replace(step_of(one), left_steps=None) for one in plans(9)[:-1]]
    train(tmp_path, settings, moves)
    saved = Checkpoints(tmp_path, 1).newest()

    assert pytest.approx([0.001, 0.001, 0.001 * 2 / 3, 0.001 / 3]) == [
        line["rate"] for line in lines(tmp_path)
    ]
    assert saved is not None
    assert 0.001 == Schedule(section(warmup_steps=0), saved.info["schedule"]).rate(4, None)


def step_of(move: StepPlan | Idle | End) -> StepPlan:
    """A plan that is a step."""
    assert isinstance(move, StepPlan)
    return move


def test_a_limit_below_the_steps_made_ends_it_at_once(tmp_path: Path) -> None:
    """A training resumed with fewer `max_steps` than it has made makes no more."""

    def stand_at_three(loop: Loop, _placed: Placed) -> None:
        loop.progress.step = 3

    loop, controller, _ = train(tmp_path, section(max_steps=2), plans(2), before=stand_at_three)

    assert controller is not None
    assert (3, None, "train.max_steps") == (loop.progress.step, controller.stopped, controller.why)


def test_nothing_to_train_on_leaves_no_model(tmp_path: Path) -> None:
    """A stream that ends before it began."""
    loop, controller, _ = train(tmp_path, section(), [End({})])

    assert 0 == loop.progress.step
    assert controller is not None
    assert controller.stopped is None
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "LATEST").exists()


def test_a_full_disk_at_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    """The checkpoint before it is whole."""
    tiny.write_model(tmp_path / "base")
    settings = section(save_every_steps=1)
    train(tmp_path, settings, [plans(2)[0], End({"position": 1})], base=tmp_path / "base")
    with disk_full_beyond(20_000), pytest.raises(SinkError, match=r"cannot write .*step-0000001.*is whole"):
        train(tmp_path, settings, plans(2), base=tmp_path / "base")
