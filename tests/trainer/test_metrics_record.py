"""The record of a training: ages, utilisation, trackers, and the last line."""

import asyncio
import math
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma4TextConfig

from streamsyn.errors import ConfigError
from streamsyn.trainer.examples import Example, Key, StepPlan
from streamsyn.trainer.metrics.mfu import Balance, Mfu, ModelFlops, mfu_of, model_flops, peak_flops
from streamsyn.trainer.metrics.record import TrainingMetrics, verdict
from streamsyn.trainer.metrics.trackers import start_tracking
from streamsyn.trainer.model.placed import start_accelerator
from streamsyn.trainer.stream.planner import PlanQueue
from tests.examples import in_turn
from tests.trainer import tiny
from tests.trainer.by_hand import fresh, plans, section, train

TIMES = ("tokens_per_s", "target_tokens_per_s", "step_s", "wall_s")
READER = "tensorboard.backend.event_processing.event_accumulator"


def lines(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [orjson.loads(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]


def seen(ago_s: float, number: int) -> Example:
    """An example that was first seen `ago_s` seconds ago."""
    made = tiny.example(10, 2, number)
    return Example(made.key, made.id, made.task, made.tokens, made.loss_from, time.monotonic() - ago_s)


def note(figures: TrainingMetrics, step: int, plan: StepPlan, waited_s: float = 0.0, **more: Any) -> None:
    """A step with a loss of 1 for each example."""
    line = {"step": step, "loss": 1.0, "rate": 0.1, "tokens": plan.tokens, "dropped": 0, **more}
    line["target_tokens"] = plan.target_tokens
    figures.step(line, plan, [1.0] * plan.count, waited_s)


def test_ages_are_those_of_the_examples(tmp_path: Path) -> None:
    """Median and greatest of the seconds since each example of the step was first seen."""
    figures = TrainingMetrics(tmp_path, 0)
    note(figures, 1, StepPlan(((seen(1, 0), seen(60, 1)), (seen(5, 2),)), {}))
    (line,) = lines(tmp_path)

    assert line["age_median_s"] == pytest.approx(5, abs=0.5)
    assert line["age_max_s"] == pytest.approx(60, abs=0.5)


def test_evaluations_do_not_count_as_step_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a step is waiting for its plan and training: evaluations before and after it do not lower
    tokens per second."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    figures, plan = TrainingMetrics(tmp_path, 0), StepPlan(((tiny.example(100, 50),),), {})
    now += 3 + 30  # waits for the plan, and evaluates before the first step
    figures.evaluation(0, {"nll_with_context": 2.0})
    figures.lap()
    now += 1
    note(figures, 1, plan, waited_s=3.0)
    now += 6  # saves
    figures.lap()
    now += 2
    note(figures, 2, plan, waited_s=3.0)
    _, first, second = lines(tmp_path)

    assert (25.0, 12.5, 4.0, 34.0) == tuple(first[name] for name in TIMES)
    assert (50.0, 25.0, 2.0, 42.0) == tuple(second[name] for name in TIMES)
    assert (3.0, round(3 / 34, 4)) == (first["wait_s"], first["wait_share"])
    assert (0.0, round(3 / 42, 4)) == (second["wait_s"], second["wait_share"])


def test_pauses_are_recorded(tmp_path: Path) -> None:
    """Each checkpoint and each publication has a line; the last line has their number and sums."""
    settings = section(save_every_steps=2)
    _, controller, _ = train(tmp_path, settings, plans(5))
    assert controller is not None
    ended = controller.record_end()

    found = [(line["step"], line["pause_s"]) for line in lines(tmp_path) if line["kind"] == "checkpoint"]
    assert [2, 4, 5] == [step for step, _ in found]
    assert all(pause_s > 0 for _, pause_s in found)
    assert (3, 0) == (ended["checkpoints"], ended["publications"])
    assert sum(pause_s for _, pause_s in found) == pytest.approx(ended["checkpoint_pause_s"], abs=1e-3)


def test_what_the_slowest_rank_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that compute 300 and 100 FLOPs: in the mean, a rank waits for a third of the step; for rank 0."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    balance = Balance(ModelFlops(1.0, 0.0, 0.0), 2)
    figures = TrainingMetrics(tmp_path, 0, balance=balance)
    rows = ((tiny.example(200, 9),), (tiny.example(40, 9),), (tiny.example(100, 9),), (tiny.example(60, 9),))
    now += 5
    figures.lap()
    now += 2
    note(figures, 1, StepPlan(rows, {}), waited_s=5.0)
    (line,) = lines(tmp_path)

    assert (0.3333, 0, 0.6667) == (line["idle_share"], line["straggler"], line["straggler_s"])


def test_utilisation_is_relative_to_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs over the peak of all devices and the time without waiting; absent if one of them is unknown."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    plan = StepPlan(((tiny.example(100, 50), tiny.example(10, 1)),), {})
    flops = 6.0 * 110 + 2.0 * 51 + 3.0 * (100**2 + 10**2)
    figures = TrainingMetrics(tmp_path, 0, mfu=Mfu(ModelFlops(6.0, 2.0, 3.0), 2 * flops))
    now += 2
    figures.lap()
    now += 1
    note(figures, 1, plan, waited_s=2.0)

    assert 0.5 == lines(tmp_path)[0]["mfu"]
    monkeypatch.undo()
    train(tmp_path, section(), plans(2))
    assert all("mfu" not in line for line in lines(tmp_path))
    assert mfu_of(tiny.model(), torch.device("cpu"), 1) is None


def test_model_flops_are_counted_by_weights() -> None:
    """The head at targets alone, tied or not; frozen weights cost a third less; no figure for experts."""
    tied, loose = tiny.model(), tiny.model(tie_word_embeddings=False)
    head = tiny.VOCABULARY * 32
    body = sum(one.numel() for one in tied.parameters()) - head
    expected = ModelFlops(6.0 * body, 6.0 * head, 12 * 2 * 32)

    assert expected == model_flops(tied) == model_flops(loose)
    for one in tied.model.layers.parameters():
        one.requires_grad_(False)
    frozen = model_flops(tied)
    assert frozen is not None
    assert frozen.token == pytest.approx(4.0 * body, rel=0.01)
    loose.config.num_local_experts = 8
    assert model_flops(loose) is None


def test_flops_of_different_layers_are_added_up() -> None:
    """Heads of width 8, 8 and 16: the configuration has no single width, and raises if it is read."""
    given: dict[str, Any] = {"global_head_dim": 16}  # of layers whose attention is full
    config = Gemma4TextConfig(
        vocab_size=tiny.VOCABULARY,
        vocab_size_per_layer_input=tiny.VOCABULARY,
        hidden_size=32,
        hidden_size_per_layer_input=0,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        **given,
    )
    work = model_flops(AutoModelForCausalLM.from_config(config))

    assert work is not None
    assert 12 * 4 * (8 + 8 + 16) == work.squared


@in_turn(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B300 SXM6 AC", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("NVIDIA GeForce RTX 3060", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA A10-4Q", None),
    ],
)
def test_peaks_match_whole_words_of_the_name(name: str, peak: float | None) -> None:
    """L40S is not L4; unknown devices and slices of devices have no peak."""
    assert peak == peak_flops(name)


@pytest.mark.parametrize(
    ("waits", "said"),
    [
        ((0.6, 0.55), "generation-bound"),
        ((0.6, 0.05), "reading-bound"),
        ((0.09, 0.09), "training-bound"),
        ((0.0, 0.0), "training-bound"),
    ],
)
def test_the_verdict_names_what_limits_the_training(waits: tuple[float, float], said: str) -> None:
    """Waiting counts from a tenth of the time on; tokenising is not generation."""
    assert said == verdict(*waits)


class Slow:
    """A planner without plans until released, which then reports how long it waited for its stream."""

    def __init__(self, waited_s: float) -> None:
        self._waited_s = waited_s
        self.may_go = threading.Event()

    async def next(self, timeout_s: float) -> StepPlan:
        """A plan; it takes until somebody has given up waiting for it."""
        await asyncio.to_thread(self.may_go.wait, timeout_s)
        return StepPlan(((tiny.example(10, 2),),), {})

    def statistics(self) -> dict[str, Any]:
        """What a planner says."""
        return {"waited_s": self._waited_s if self.may_go.is_set() else 0.0}


@pytest.mark.parametrize(("planner_waited_s", "share"), [(100.0, 1.0), (0.0, 0.0)])
def test_waiting_for_the_stream_differs_from_tokenising(planner_waited_s: float, share: float) -> None:
    """Only the time in which both training and planner waited counts as waiting for the stream."""
    planner = Slow(planner_waited_s)
    with PlanQueue(planner) as plans_of:
        assert plans_of.get(0.05) is None
        assert 0.0 == plans_of.stream_waited_s
        planner.may_go.set()
        assert plans_of.get(10.0) is not None
        waited = plans_of.waited_s

        assert waited >= 0.05
        assert plans_of.stream_waited_s == pytest.approx(share * waited)
        assert plans_of.get(10.0) is not None
        assert plans_of.stream_waited_s == pytest.approx(share * waited), "a wait is counted once"


def test_trackers_get_each_step_and_evaluation(tmp_path: Path) -> None:
    """tensorboard's files have the numbers of metrics.jsonl, by step; a resumed run hides the first run's
    values of repeated steps."""
    settings = section(trackers=["tensorboard"])
    for first in (0, 1):
        with fresh():
            accelerator = start_accelerator(settings, tmp_path / "tracking")
        figures = TrainingMetrics(
            tmp_path, first, track=start_tracking(accelerator, settings, tmp_path, first)
        )
        for step in range(first + 1, 4):
            note(figures, step, StepPlan(((tiny.example(10, 2),),), {}), loss=first + step / 10)
        figures.evaluation(3, {"nll_with_context": 2.5, "held_out": 3})
        accelerator.end_training()
    read = import_module(READER).EventAccumulator(str(tmp_path / "tracking" / "streamsyn"))
    read.Reload()

    losses = [(event.step, event.value) for event in read.Scalars("train/loss")]
    assert [(1, 0.1), (2, 1.2), (3, 1.3)] == [(step, round(value, 4)) for step, value in losses]
    assert 2.5 == read.Scalars("eval/nll_with_context")[-1].value
    assert {"train/tokens_per_s", "train/age_max_s", "eval/held_out"} <= set(read.Tags()["scalars"])
    assert "train/at" not in read.Tags()["scalars"]


class Opened:
    """An accelerator that records the options of its trackers."""

    def __init__(self) -> None:
        self.options: dict[str, dict[str, Any]] = {}

    def init_trackers(self, _project: str, _config: Any, options: dict[str, dict[str, Any]]) -> None:
        """As accelerate's own."""
        self.options = options


def test_all_processes_of_a_training_are_one_tracker_run(tmp_path: Path) -> None:
    """Its id differs for a different OUT and for a new training in the same OUT."""

    def options(out: Path, step: int, created_at: float) -> dict[str, dict[str, Any]]:
        out.mkdir(exist_ok=True)
        (out / "train.json").write_bytes(orjson.dumps({"created_at": created_at}))
        accelerator = Opened()
        start_tracking(accelerator, section(trackers=["wandb", "trackio"]), out, step)
        return accelerator.options

    first, later = options(tmp_path / "a", 0, 1.0), options(tmp_path / "a", 7, 1.0)
    anew, other = options(tmp_path / "a", 0, 2.0), options(tmp_path / "b", 0, 1.0)

    assert first["wandb"] == later["wandb"]
    assert first["trackio"] == later["trackio"]
    assert 3 == len({one["wandb"]["id"] for one in (first, anew, other)})
    assert 3 == len({one["trackio"]["name"] for one in (first, anew, other)})
    assert str(tmp_path / "a" / "tracking") == first["wandb"]["dir"]
    assert {"allow"} == {first[name]["resume"] for name in ("wandb", "trackio")}
    assert [{"purge_step": None}, {"purge_step": 8}] == [one["tensorboard"] for one in (first, later)]


def test_a_tracker_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    """One line, with the key."""
    (tmp_path / "tracking").write_text("a file")
    with pytest.raises(ConfigError, match=r"train\.trackers: tensorboard cannot be opened"):
        start_tracking(None, section(trackers=["tensorboard"]), tmp_path, 0)


def test_losses_that_are_not_finite_are_null(tmp_path: Path) -> None:
    """JSON has no NaN."""
    plan = StepPlan(((tiny.example(10, 2),),), {})
    figures = TrainingMetrics(tmp_path, 0)
    line = {"step": 1, "loss": math.nan, "rate": 0.1, "tokens": 10, "target_tokens": 2, "dropped": 0}
    figures.step(line, plan, [math.nan], 0.0)

    assert lines(tmp_path)[0]["loss"] is None
    assert {} == figures.tasks.state()
    (trained,) = (tmp_path / "trained.jsonl").read_bytes().splitlines()
    assert [[*Key("test", 0, 0), "sample-0", None]] == orjson.loads(trained)["examples"]
