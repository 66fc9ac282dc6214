"""From the configuration to the questions that are asked while training.

What is evaluated when: losses, and the questions of an exam. Decided on rank 0.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import structlog

from streamsyn.config.loading import Config
from streamsyn.config.train_section import TrainSection
from streamsyn.trainer.commands import Evaluate
from streamsyn.trainer.evaluation.answering import Chat
from streamsyn.trainer.evaluation.exam import Exam, Question
from streamsyn.trainer.evaluation.heldout import CONTROL, Changes, Rows, deal_rows, summary
from streamsyn.trainer.evaluation.longbench import longbench_questions
from streamsyn.trainer.evaluation.needles import needle_questions
from streamsyn.trainer.examples import Example, Key
from streamsyn.trainer.metrics.step_log import read_lines

log = structlog.get_logger()


def open_exam(config: Config, tokenizer: Any, model: Any, out: Path) -> Exam | None:
    """The questions of `train.needles` and `train.longbench`; None when neither is given.

    Args:
        config: The whole configuration.
        tokenizer: That of `model`; a copy of it is used.
        model: Says how many positions it knows, and what ends its answers.
        out: Where the training keeps its files.

    Raises:
        ConfigError: They cannot be asked, or there are none.
    """
    section = config.train
    if section.needles is None and section.longbench is None:
        return None
    chat = Chat(copy.deepcopy(tokenizer), _ends(model))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    questions: list[Question] = []
    if section.needles is not None:
        seed = config.run.seed
        questions += needle_questions(section.needles, seed, chat, positions)
    if section.longbench is not None:
        longest = section.seq_len if positions is None else min(section.seq_len, positions)
        questions += longbench_questions(section.longbench, chat, longest)
    log.info("train.exam", questions=len(questions), parts=len({one.part for one in questions}))
    return Exam(questions, chat, out)


def _ends(model: Any) -> list[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return list(ends) if isinstance(ends, list) else [] if ends is None else [ends]


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
