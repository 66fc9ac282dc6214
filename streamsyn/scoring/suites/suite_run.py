"""Asks servers the questions of suites, and makes a table of scores with confidence intervals."""

import asyncio
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import fmean
from typing import Any, Final

import numpy
import structlog

from streamsyn.answer_text import without_thought
from streamsyn.background import background
from streamsyn.config.command_sections import NeedlesSection
from streamsyn.config.sections import FleetSection
from streamsyn.errors import ConfigError, FleetGone, ServerError, StoppedEarly, root_cause
from streamsyn.fleet.fleet import Fleet, open_fleet
from streamsyn.queues import BoundedQueue
from streamsyn.records import Request
from streamsyn.scoring.examiner import scoring_model
from streamsyn.scoring.measures import ScoringClient, context_group
from streamsyn.scoring.suites.graphwalks_suite import GRAPHWALKS
from streamsyn.scoring.suites.longbench_suite import V2
from streamsyn.scoring.suites.mrcr_suite import MRCR
from streamsyn.scoring.suites.needle_suite import measured, needle_questions
from streamsyn.scoring.suites.suite_question import SuiteQuestion, as_user

log = structlog.get_logger()

_QUEUE: Final = 16
"""Questions that are read ahead."""
_RESAMPLES: Final = 2000
_LOG_EVERY_S: Final = 10.0
OVERALL: Final = "overall"
_BY_QUESTION: Final = frozenset({V2, MRCR, GRAPHWALKS})
"""Suites whose overall score is published as the mean over questions; of the others it is that over parts."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with the model's answer.

    Attributes:
        score: From 0 to 1.
        error: Why there is no answer; None if there is one.
        version: The weights that wrote it, as SGLang reports them.
    """

    question: SuiteQuestion
    answer: str = ""
    score: float = 0.0
    error: str | None = None
    version: str | None = None

    def row(self) -> dict[str, Any]:
        """As it is written to `--out`."""
        asked = self.question
        return {
            "suite": asked.suite,
            "part": asked.part,
            "id": asked.id,
            "answer": self.answer,
            "wanted": asked.wanted,
            "score": round(self.score, 4),
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class SuiteRow:
    """A row of the table: a part of a suite, or all of it.

    Attributes:
        questions: Number of answered questions.
        score: Mean score, from 0 to 100.
        low: Lower end of the 95 % confidence interval.
        high: Its upper end.
    """

    suite: str
    part: str
    questions: int
    score: float
    low: float
    high: float


@dataclass(slots=True, kw_only=True)
class SuiteRun:
    """Asks all questions, as many at a time as the servers take.

    A question that no server can answer, for example because it is too long, is kept with its error.

    Attributes:
        questions: The questions; read while others are asked.
        total: Number of questions, needles included.
        fleet: The section `fleet`.
        needles: Needle questions to ask first, with `run.seed`; None for none.
        model: The model to ask; None for the one that is served, or the first by name.
        on_answer: Called with each answer as it comes; may block.
        environ: Holds the servers' credentials.
    """

    questions: Iterable[SuiteQuestion]
    total: int
    fleet: FleetSection
    needles: tuple[NeedlesSection, int] | None = None
    model: str | None = None
    on_answer: Callable[[Answered], None] = lambda _: None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    answered: list[Answered] = field(default_factory=list)
    _gone: str | None = None

    async def run(self) -> list[Answered]:
        """Ask, and return all answers in the order in which they came.

        Raises:
            ConfigError: A server, or a row of a suite, cannot be used.
            FleetGone: No server was usable for `fleet.give_up_s`.
        """
        fleets: list[Fleet] = []

        def gone(reason: str) -> None:
            self._gone = reason
            for fleet in fleets:
                fleet.drain()

        try:
            async with open_fleet(self.fleet, gone, self.environ) as fleet:
                fleets.append(fleet)
                await fleet.ask_models()
                await self._ask(fleet, scoring_model(fleet, self.model))
        except BaseException as error:
            cause = root_cause(error)
            if self._gone is not None and isinstance(cause, StoppedEarly):
                raise FleetGone(self._gone) from error
            raise cause from None
        return self.answered

    async def _ask(self, fleet: Fleet, model: str) -> None:
        work: BoundedQueue[SuiteQuestion] = BoundedQueue(_QUEUE)
        started = 0
        async with background() as tasks, asyncio.TaskGroup() as group:

            def grow() -> None:
                nonlocal started
                while started <= fleet.capacity and not work.closed:
                    started += 1
                    working = self._work(work, fleet, model)
                    try:
                        group.create_task(working, name=f"evaluate-{started}")
                    except RuntimeError:  # the group is ending
                        working.close()
                        return

            tasks.start(self._report(), name="evaluate-progress")
            questions = chain(await self._needles(fleet, model), self.questions)
            reading = group.create_task(self._read(questions, work), name="evaluate-read")
            reading.add_done_callback(lambda _: work.close())
            fleet.on_room(grow)
            grow()

    async def _needles(self, fleet: Fleet, model: str) -> Iterable[SuiteQuestion]:
        """Needle questions as long as the model's tokenizer makes them, by two requests.

        Raises:
            ConfigError: They cannot be measured, or a length is too short.
        """
        if self.needles is None:
            return ()
        section, seed = self.needles

        async def prompt_tokens(text: str) -> int:
            request = Request([*as_user(text)], {"temperature": 0, "max_tokens": 1})
            return (await ScoringClient(fleet, model).complete(request)).prompt_tokens

        try:
            lengths = await measured(prompt_tokens)
        except ServerError as error:
            raise ConfigError(f"--suite needles: their lengths cannot be measured: {error}") from error
        return needle_questions(section, seed, lengths)

    async def _read(self, asked: Iterable[SuiteQuestion], work: BoundedQueue[SuiteQuestion]) -> None:
        questions = iter(asked)
        while (question := await asyncio.to_thread(next, questions, None)) is not None:
            await work.put(question)

    async def _work(self, work: BoundedQueue[SuiteQuestion], fleet: Fleet, model: str) -> None:
        async for question in work:
            sampling = {"temperature": 0, "max_tokens": question.max_tokens}
            try:
                completion = await ScoringClient(fleet, model).complete(
                    Request([*question.messages], sampling, context_group(question.prompt))
                )
            except ServerError as error:
                log.warning("evaluate.failed", suite=question.suite, id=question.id, error=str(error))
                found = Answered(question, error=str(error))
            else:
                answer = without_thought(completion.text)
                score = await asyncio.to_thread(question.rule, answer)
                found = Answered(question, answer, score, version=completion.weight_version)
            await asyncio.to_thread(self.on_answer, found)
            self.answered.append(found)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_LOG_EVERY_S)
            log.info("evaluate.progress", answered=len(self.answered), of=self.total)


def suite_table(answered: Sequence[Answered]) -> list[SuiteRow]:
    """The rows of the table: the parts of each suite by name, the others that they count in, then all of it.

    All of a suite is the mean over its parts or over its questions, as it is published. Questions without an
    answer are left out.
    """
    rows: list[SuiteRow] = []
    scored = [one for one in answered if one.error is None]
    for suite in sorted({one.question.suite for one in scored}):
        # Sorted, so that intervals do not depend on the order in which answers came.
        some = sorted((one for one in scored if one.question.suite == suite), key=_order)
        parts = {one.question.part for one in some}
        others = {one.question.also for one in some} - {""}
        rows += [
            _row(suite, name, [one for one in some if name in (one.question.part, one.question.also)])
            for names in (parts, others)
            for name in sorted(names, key=_in_numbers)
        ]
        rows.append(_row(suite, OVERALL, some))
    return rows


def _in_numbers(name: str) -> list[tuple[int, str]]:
    """A key that sorts `up to 8k` before `up to 16k`."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def _order(one: Answered) -> tuple[str, str]:
    return one.question.part, one.question.id


def _row(suite: str, part: str, some: Sequence[Answered]) -> SuiteRow:
    """The mean score, and its interval: percentiles of the means of resamples."""
    groups: dict[str, list[float]] = {}
    for one in some:
        groups.setdefault("" if suite in _BY_QUESTION else one.question.part, []).append(one.score)
    rng = numpy.random.default_rng([*f"{suite} {part}".encode()])
    resampled = [rng.choice(group, (_RESAMPLES, len(group))).mean(axis=1) for group in groups.values()]
    low, high = numpy.percentile(numpy.mean(resampled, axis=0), [2.5, 97.5])
    score = fmean(map(fmean, groups.values()))
    return SuiteRow(suite, part, len(some), 100 * score, 100 * float(low), 100 * float(high))
