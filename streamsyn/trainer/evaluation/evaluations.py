"""What is evaluated when: losses, and the questions of an exam. Decided on rank 0."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from streamsyn.sections import TrainSection
from streamsyn.trainer.evaluation.grading import Exam
from streamsyn.trainer.evaluation.losses import CONTROL, Changes, Rows, deal_rows, summary
from streamsyn.trainer.figures.steplog import read_lines
from streamsyn.trainer.orders import Evaluate
from streamsyn.trainer.stream.examples import Example, Key

HeldOutRows = Callable[[], dict[str, list[Rows]]]
"""The held-out rows to evaluate now, for each kind and rank; none when nothing is held out so far."""


@dataclass(slots=True)
class Done:
    """The last steps at which losses were measured, and at which an exam was finished."""

    measured: int | None = None
    examined: int | None = None


class Evaluations:
    """Makes the orders of evaluations, and figures of what came of them.

    There is one before the first step, one every `train.eval_every_steps`, one at the end; the exam, which
    takes its time, may come at other steps in between, and then losses are measured with it.

    Args:
        section: `train`.
        held_out: The rows that are held out of the stream by now.
        control: Short chat data.
        exam: Questions to be answered.
        world: How many ranks there are.
        done: What an earlier run did at the step where this one begins.
        state: What `state` gave there.
    """

    def __init__(
        self,
        section: TrainSection,
        held_out: HeldOutRows,
        control: Sequence[Example] = (),
        exam: Exam | None = None,
        world: int = 1,
        done: Done | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._section = section
        self._held_out = held_out
        self._control = deal_rows(control, section.seq_len, world) if control else None
        self._exam = exam
        self._world = world
        self._done = done or Done()
        self._changes = Changes(state)

    def state(self) -> dict[str, Any]:
        """What a later run goes on from."""
        return self._changes.state()

    def due(self, step: int, *, last: bool = False) -> list[Evaluate] | None:
        """An order for each rank, of what is due at a step and not done; None when nothing is.

        Args:
            step: Steps trained so far.
            last: Whether no more come.
        """
        section = self._section
        always = last or step == 0
        examines = (
            self._exam is not None
            and self._done.examined != step
            and (always or step % (section.tests_every_steps or section.eval_every_steps) == 0)
        )
        measures = self._done.measured != step and (
            always or examines or step % section.eval_every_steps == 0
        )
        rows = self._rows() if measures else {}
        questions = self._exam.questions if self._exam is not None and examines else ()
        if not rows and not questions:
            return None
        prompts = [*(one.prompt for one in questions), *[None] * (-len(questions) % self._world)]
        return [
            Evaluate({kind: dealt[rank] for kind, dealt in rows.items()}, tuple(prompts[rank :: self._world]))
            for rank in range(self._world)
        ]

    def figures(
        self,
        step: int,
        orders: Sequence[Evaluate],
        measured: Mapping[str, Sequence[Sequence[float]]],
        answers: Sequence[Sequence[int]],
    ) -> dict[str, Any]:
        """What an evaluation has found; `partial` in it when it was stopped before its end.

        Args:
            step: Steps trained so far.
            orders: What each rank was told to do.
            measured: The losses of each kind of samples, rank by rank, in the order of the rank's rows.
            answers: What was answered to the first questions, or to all.

        Raises:
            SinkError: The answers cannot be written.
        """
        found: dict[str, Any] = {}
        if orders[0].rows:
            self._done.measured = step
            losses = {
                kind: dict(zip(_keys(orders, kind), chain.from_iterable(by_rank), strict=True))
                for kind, by_rank in measured.items()
            }
            found = {**summary(losses), **self._changes.take(losses)}
        if orders[0].prompts and self._exam is not None:
            found |= self._exam.grade(step, answers)
            if len(answers) < len(self._exam.questions):
                found["partial"] = True
            else:
                self._done.examined = step
        return found

    def _rows(self) -> dict[str, list[Rows]]:
        rows = self._held_out()
        return rows if self._control is None else {**rows, CONTROL: self._control}


def _keys(orders: Sequence[Evaluate], kind: str) -> Iterator[Key]:
    for order in orders:
        for row in order.rows[kind]:
            yield from (example.key for example in row)


def done_before(metrics: Path, step: int, exam: Exam | None) -> Done:
    """What OUT/metrics.jsonl says was done at the step where a run goes on."""
    done = Done()
    for found in read_lines(metrics):
        if (found.get("kind"), found.get("step")) != ("evaluation", step):
            continue
        if any(name.startswith("nll_") for name in found):
            done.measured = step
        if exam is not None and exam.names <= found.keys():
            done.examined = step
    return done
