"""Trains on plans made by hand: in this process, or as one of several ranks."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from streamsyn.config.command_sections import TrainSection
from streamsyn.trainer.commands import Prompt, Ranks
from streamsyn.trainer.controller import Controller, Totals
from streamsyn.trainer.evaluation.evaluations import Evaluations, done_before
from streamsyn.trainer.evaluation.exam import Chat, Exam, Question
from streamsyn.trainer.evaluation.heldout import WITH, deal_rows
from streamsyn.trainer.examples import End, Example, Idle, StepPlan
from streamsyn.trainer.loop import Loop, Progress, Schedule
from streamsyn.trainer.metrics.record import TrainingMetrics
from streamsyn.trainer.model.placed import Placed, place, start_accelerator
from streamsyn.trainer.model.pretrained import model_dtype, read_model
from streamsyn.trainer.saving.checkpoint import Checkpoints
from streamsyn.trainer.saving.store import Store
from streamsyn.trainer.stream.planner import PlanQueue
from tests.trainer import tiny

LENGTHS = ((30, 8), (12, 3), (50, 20), (9, 1), (25, 6), (40, 2), (18, 9))


class Script:
    """A planner that returns the given plans."""

    def __init__(self, moves: Sequence[StepPlan | Idle | End]) -> None:
        self._moves = list(moves)

    async def next(self, timeout_s: float) -> StepPlan | Idle | End:
        assert timeout_s > 0
        return self._moves.pop(0)

    def statistics(self) -> dict[str, Any]:
        return {"dropped": {"overlong": 2}, "held": 0, "waited_s": 0.0}


def section(**given: Any) -> TrainSection:
    """Settings for a few steps of a tiny model."""
    return TrainSection.model_validate(
        {"seq_len": 64, "learning_rate": 0.001, "warmup_steps": 2, "rows_per_step": 4, **given}
    )


def plans(steps: int, rows: int = 4) -> list[StepPlan | Idle | End]:
    """Steps over the same samples, whatever the number of rows they are dealt to; the last one is small."""
    made: list[StepPlan | Idle | End] = []
    for step in range(steps):
        samples = [tiny.example(*size, seed=100 * step + n) for n, size in enumerate(LENGTHS)]
        samples = samples[:2] if step == steps - 1 else samples
        dealt: list[list[Example]] = [[] for _ in range(rows)]
        for n, one in enumerate(samples):
            dealt[n % rows].append(one)
        made.append(StepPlan(tuple(map(tuple, dealt)), {"position": step + 1}, steps - step - 1))
    return [*made, End({"position": "end"})]


@contextmanager
def fresh() -> Iterator[None]:
    """Reset the state that accelerate keeps in the process."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    yield


def placed_model(folder: Path, settings: TrainSection) -> Placed:
    """The model in `folder`, on CPU."""
    accelerator: Accelerator = start_accelerator(settings)
    read = read_model(str(folder), settings, accelerator, seed=0)
    return place(read, settings, accelerator, model_dtype(str(folder)))


def train(
    out: Path,
    settings: TrainSection,
    moves: Sequence[StepPlan | Idle | End],
    *,
    base: Path | None = None,
    rank: int = 0,
    world: int = 1,
    held_out: Sequence[Example] = (),
    control: Sequence[Example] = (),
    exam: Exam | None = None,
    before: Callable[[Loop, Placed], None] | None = None,
) -> tuple[Loop, Controller | None, Placed]:
    """Train a tiny model to the end of `moves`, in OUT; `before` is called with what is about to run."""
    if base is None:
        base = out / "base"
        if rank == 0 and not base.exists():
            tiny.write_model(base)
    with fresh():
        placed = placed_model(base, settings)
    ranks = Ranks(rank, world)
    if rank == 0:
        Checkpoints(out, settings.keep_checkpoints).prepare()
    store = Store(out, settings, tiny.tokenizer(), ranks)
    loop = Loop(placed, ranks, settings, 0, store, Progress())
    if rank != 0:
        loop.run(None)
        return loop, None, placed

    def rows() -> Any:
        return {WITH: deal_rows(held_out, settings.seq_len, world)} if held_out else {}

    done = done_before(out / "metrics.jsonl", 0, exam)
    evaluations = Evaluations(settings, rows, control, exam, world, done)
    if before is not None:
        before(loop, placed)
    with PlanQueue(Script(moves)) as queue:
        figures = TrainingMetrics(out, 0)
        controller = Controller(
            settings, ranks, queue, loop.progress, store, Schedule(settings), figures, evaluations, Totals()
        )
        loop.run(controller.commands(lambda: loop.stopping))
    return loop, controller, placed


def exam(out: Path) -> Exam:
    """Five short questions in three parts; a random model answers right only by chance."""
    asked = []
    for number, (part, length) in enumerate(
        [("needle_one", 30), ("needle_one", 70), ("needle_two", 50), ("longbench_a", 9), ("longbench_a", 20)]
    ):
        prompt = Prompt(tiny.example(length, 1, 700 + number).tokens, 8, frozenset({256}))
        of, grading = ("needles", "recall") if part.startswith("needle") else ("longbench", "f1")
        asked.append(Question(of, part, str(number), prompt, ("a", "b"), grading))  # type: ignore[arg-type]
    return Exam(asked, Chat(tiny.tokenizer()), out)


def weights(placed: Placed) -> dict[str, torch.Tensor]:
    """All weights of a model, as they are now."""
    return {name: one.detach().clone() for name, one in placed.plain.named_parameters()}


def main() -> None:
    """Train as one of several ranks: `by-hand FOLDER STEPS`, in the environment of a launcher."""
    folder, steps = Path(sys.argv[2]), int(sys.argv[3])
    rank = int(os.environ["RANK"])
    kept_out = [tiny.example(20, 5, 900 + n) for n in range(3)]
    made = train(
        folder,
        section(),
        plans(steps),
        base=folder / "base",
        rank=rank,
        world=int(os.environ["WORLD_SIZE"]),
        held_out=kept_out,
        exam=exam(folder),
    )[2]
    torch.save(weights(made), folder / f"weights-{rank}.pt")
    torch.distributed.destroy_process_group()
