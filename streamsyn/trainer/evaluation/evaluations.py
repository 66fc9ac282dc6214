"""Plans evaluations on rank 0: when they are due, commands for the ranks, metrics from the results."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import structlog

from streamsyn.config.command_sections import TrainSection
from streamsyn.config.loading import Config
from streamsyn.scoring.suites.needle_suite import needle_questions
from streamsyn.trainer.commands import Evaluate
from streamsyn.trainer.evaluation.exam import Chat, Exam, Question, rendered
from streamsyn.trainer.evaluation.heldout import CONTROL, Changes, Rows, deal_rows, row_tokens, summary
from streamsyn.trainer.evaluation.longbench import longbench_questions
from streamsyn.trainer.examples import Example, Key
from streamsyn.trainer.metrics.step_log import read_lines

log = structlog.get_logger()


def open_exam(config: Config, tokenizer: Any, model: Any, out: Path) -> Exam | None:
    """Make the questions of `train.needles` and `train.longbench`; None if neither is configured.

    Args:
        config: The whole configuration.
        tokenizer: The model's tokenizer, which is copied.
        model: Its configuration has the number of positions and the stop tokens.
        out: OUT.

    Raises:
        ConfigError: A section does not fit the model, or there are no questions.
    """
    section = config.train
    if section.needles is None and section.longbench is None:
        return None
    chat = Chat(copy.deepcopy(tokenizer), _stop_tokens(model))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    questions: list[Question] = []
    if section.needles is not None:
        asked = needle_questions(section.needles, config.run.seed, chat, positions)
        questions += [rendered(one, chat) for one in asked]
    if section.longbench is not None:
        longest = section.seq_len if positions is None else min(section.seq_len, positions)
        questions += longbench_questions(section.longbench, chat, longest)
    log.info("train.exam", questions=len(questions), parts=len({one.part for one in questions}))
    return Exam(questions, chat, out)


def _stop_tokens(model: Any) -> list[int]:
    tokens = getattr(model.generation_config, "eos_token_id", None)
    return list(tokens) if isinstance(tokens, list) else [] if tokens is None else [tokens]


HeldOutRows = Callable[[], dict[str, list[Rows]]]
"""Returns the held-out rows to evaluate now, for each kind and group of ranks; empty while none are held
out."""


@dataclass(slots=True)
class Done:
    """The last steps at which losses were measured and the exam was finished."""

    measured: int | None = None
    examined: int | None = None


class Evaluations:
    """Decides what to evaluate, and turns results into the fields of a line of metrics.jsonl.

    Losses are measured before the first step, every `train.eval_every_steps` and at the end. The exam, which
    takes longer, has its own interval (`train.tests_every_steps`); losses are measured with it too.

    Args:
        section: `train`.
        held_out: Returns the held-out rows.
        control: Control data.
        exam: The exam; None without one.
        world: Number of ranks.
        done: What was done before at the step where the training resumes.
        state: The return value of `state` at that step.
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
        self._degree = section.sequence_parallel
        groups = world // self._degree
        self._control = deal_rows(control, row_tokens(section), groups) if control else None
        self._exam = exam
        self._world = world
        self._done = done or Done()
        self._changes = Changes(state)

    def state(self) -> dict[str, Any]:
        """The state to resume from, as JSON values."""
        return self._changes.state()

    def due(self, step: int, *, last: bool = False) -> list[Evaluate] | None:
        """The command for each rank of what is due at a step and not yet done; None if nothing is.

        Args:
            step: Steps trained so far.
            last: Whether it is the last step.
        """
        section = self._section
        always = last or step == 0
        # Servers answer in between.
        every = section.tests_every_steps or (None if section.eval_servers else section.eval_every_steps)
        examines = (
            self._exam is not None
            and self._done.examined != step
            and (always or (every is not None and step % every == 0))
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
            Evaluate(
                {kind: dealt[rank // self._degree] for kind, dealt in rows.items()},
                tuple(prompts[rank :: self._world]),
            )
            for rank in range(self._world)
        ]

    def metrics(
        self,
        step: int,
        commands: Sequence[Evaluate],
        measured: Mapping[str, Sequence[Sequence[float]]],
        answers: Sequence[Sequence[int]],
    ) -> dict[str, Any]:
        """The fields of an evaluation, with `partial` if the exam was stopped before its end.

        Args:
            step: Steps trained so far.
            commands: The command of each rank.
            measured: The losses of each kind of samples, by rank, in the order of the rank's rows.
            answers: Tokens of the answers; fewer than there are questions if the exam was stopped.

        Raises:
            SinkError: The answers cannot be written.
        """
        found: dict[str, Any] = {}
        if commands[0].rows:
            self._done.measured = step
            firsts = slice(None, None, self._degree)  # all ranks of a group have the same rows
            losses = {
                kind: dict(
                    zip(_keys(commands[firsts], kind), chain.from_iterable(by_rank[firsts]), strict=True)
                )
                for kind, by_rank in measured.items()
            }
            found = {**summary(losses), **self._changes.update(losses)}
        if commands[0].prompts and self._exam is not None:
            found |= self._exam.grade(step, answers)
            if len(answers) < len(self._exam.questions):
                found["partial"] = True
            else:
                self._done.examined = step
        return found

    def _rows(self) -> dict[str, list[Rows]]:
        rows = self._held_out()
        return rows if self._control is None else {**rows, CONTROL: self._control}


def _keys(commands: Sequence[Evaluate], kind: str) -> Iterator[Key]:
    for command in commands:
        for row in command.rows[kind]:
            yield from (example.key for example in row)


def done_before(metrics: Path, step: int, exam: Exam | None) -> Done:
    """Read from OUT/metrics.jsonl what was done at the step where a training resumes."""
    done = Done()
    for found in read_lines(metrics):
        if (found.get("kind"), found.get("step")) != ("evaluation", step):
            continue
        if any(name.startswith("nll_") for name in found):
            done.measured = step
        if exam is not None and exam.names <= found.keys():
            done.examined = step
    return done
