"""OUT/trained.jsonl and OUT/task_losses.json: what was trained on, when, and how hard it was."""

import math
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.errors import SinkError
from streamsyn.trainer.examples import StepPlan
from streamsyn.trainer.metrics.record import HALF_LIFE, TaskLosses
from streamsyn.trainer.metrics.step_log import StepLog
from tests.builders import disk_full_beyond
from tests.trainer import tiny
from tests.trainer.by_hand import plans, section, train
from tests.trainer.streams import example

pytestmark = pytest.mark.timeout(180)

STEPS = 3


def lineage(out: Path) -> list[dict[str, Any]]:
    """The lines of trained.jsonl."""
    return [orjson.loads(line) for line in (out / "trained.jsonl").read_bytes().splitlines()]


def planned(steps: int) -> list[list[list[Any]]]:
    """What the plans train on in each step."""
    made = [plan for plan in plans(steps) if isinstance(plan, StepPlan)]
    return [[[*one.key, one.id] for one in plan.examples()] for plan in made]


def naive_losses() -> list[float]:
    """The losses of the first step's examples, each by itself, before anything was learnt."""
    plan, model = plans(STEPS)[0], tiny.model("eager")
    assert isinstance(plan, StepPlan)
    found = []
    for one in plan.examples():
        ids = torch.from_numpy(one.tokens).long()
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, one.loss_from - 1 : -1]
        found.append(float(torch.nn.functional.cross_entropy(logits, ids[one.loss_from :])))
    return found


def test_the_lineage_follows_the_plans(tmp_path: Path) -> None:
    """Each step's line names its examples in the order of the plan, each with its own mean loss."""
    train(tmp_path, section(), plans(STEPS))
    found = lineage(tmp_path)

    assert list(range(1, STEPS + 1)) == [line["step"] for line in found]
    assert planned(STEPS) == [[one[:4] for one in line["examples"]] for line in found]
    assert naive_losses() == pytest.approx([one[4] for one in found[0]["examples"]], rel=1e-5)
    steps = [orjson.loads(line) for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines()]
    for line, step in zip(found, steps, strict=False):
        losses = [one[4] for one in line["examples"]]
        assert step["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert line["at"] == step["at"]


def test_a_step_that_was_skipped_has_no_losses(tmp_path: Path) -> None:
    """Its examples are named, with null; the losses of tasks do not change."""
    settings = section(learning_rate=1e30, max_grad_norm=1e30)
    loop, _, _ = train(tmp_path, settings, plans(STEPS))
    found = lineage(tmp_path)

    assert loop.progress.skipped == STEPS - 1
    assert planned(STEPS) == [[one[:4] for one in line["examples"]] for line in found]
    assert all(one[4] is not None for one in found[0]["examples"])
    assert all(one[4] is None for line in found[1:] for one in line["examples"])
    tasks = orjson.loads((tmp_path / "task_losses.json").read_bytes())["tasks"]
    assert len(found[0]["examples"]) == tasks["qa"]["examples"]


def test_task_losses_are_written_with_each_checkpoint(tmp_path: Path) -> None:
    """The file is of the last step; the checkpoint holds the same, so that a later run resumes from it."""
    train(tmp_path, section(), plans(STEPS))
    found = orjson.loads((tmp_path / "task_losses.json").read_bytes())
    noted = orjson.loads((tmp_path / "checkpoints" / f"step-{STEPS:07d}" / "info.json").read_bytes())

    losses = [one[4] for line in lineage(tmp_path) for one in line["examples"]]
    assert STEPS == found["step"]
    assert {"qa"} == found["tasks"].keys()
    assert len(losses) == found["tasks"]["qa"]["examples"]
    assert found["tasks"]["qa"]["loss"] == pytest.approx(by_definition(losses))
    assert found["tasks"] == noted["task_losses"]


def by_definition(losses: list[float]) -> float:
    """A mean in which a loss weighs half as much as one that came HALF_LIFE later."""
    weights = [math.pow(0.5, (len(losses) - at) / HALF_LIFE) for at in range(len(losses))]
    summed = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    return summed / sum(weights)


@given(st.lists(st.floats(0, 20), min_size=1, max_size=120), st.integers(0, 120))
def test_task_losses_are_resumed(losses: list[float], stop: int) -> None:
    """Stopped anywhere and resumed from their state, they equal the mean by its definition."""
    nowhere = Path()
    examples = [example(5, number) for number in range(len(losses))]
    first = TaskLosses(nowhere, {})
    first.add(examples[:stop], losses[:stop])
    second = TaskLosses(nowhere, orjson.loads(orjson.dumps(first.state())))
    second.add(examples[stop:], losses[stop:])

    state = second.state()["qa"]
    assert state["loss"] == pytest.approx(by_definition(losses))
    assert len(losses) == state["examples"]


@given(
    st.lists(st.integers(0, 6), max_size=12).map(sorted),
    st.integers(0, 7),
    st.sampled_from([b"", b'{"step": 1', b"\0\0\0", b'{"step": 1}\xff\n', b"[]\n"]),
)
def test_lines_after_a_checkpoint_are_cut_off(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], step: int, torn: bytes
) -> None:
    """Lines up to the step stay, byte for byte; later lines, and what a power cut left, are removed."""
    path = tmp_path_factory.mktemp("log") / "lines"
    written = [orjson.dumps({"step": one, "filler": "x" * one}) + b"\n" for one in steps]
    path.write_bytes(b"".join(written) + torn)
    log = StepLog(path, step)
    kept = [line for one, line in zip(steps, written, strict=True) if one <= step]

    assert b"".join(kept) == path.read_bytes()
    log.append({"step": 9})
    assert b"".join(kept) + b'{"step":9}\n' == path.read_bytes()


def test_a_line_about_an_earlier_step_is_cut_off_by_when_it_was_written(tmp_path: Path) -> None:
    """Servers answer about weights of step 2 while the training is at step 5."""
    path = tmp_path / "metrics.jsonl"
    written = [b'{"step":3}\n', b'{"step":5}\n', b'{"step":2,"at_step":5}\n']
    path.write_bytes(b"".join(written))
    StepLog(path, 5)
    assert b"".join(written) == path.read_bytes()
    StepLog(path, 4)
    assert written[0] == path.read_bytes()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """It names the file that cannot be written."""
    log = StepLog(tmp_path / "trained.jsonl", 0)
    with disk_full_beyond(10), pytest.raises(SinkError, match=r"cannot write .*trained\.jsonl"):
        log.append({"step": 1, "filler": "x" * 100})
