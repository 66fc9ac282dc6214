"""`streamsyn score`: measures the contexts of a log, finished or growing, into the sidecar.

Two passes over the contexts that the log holds at the start. The first compares texts, in the order of the
log: near-duplicates and leaks. The second asks servers: context gain and answers. A pass skips what is
measured, so that a later `score` goes on where a kill, a stop or the end of the log ended this one.
"""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Final, TypeAlias

import structlog

from streamsyn.background import background
from streamsyn.config.loading import Config
from streamsyn.errors import ConfigError, FleetGone, StoppedEarly, root_cause
from streamsyn.fleet.fleet import Fleet, open_fleet
from streamsyn.fleet.membership import Connect
from streamsyn.io.durable import make_folder
from streamsyn.queues import BoundedQueue
from streamsyn.recipes.registry import load_recipe
from streamsyn.scoring.contamination import EvalSets, Overlap
from streamsyn.scoring.duplicates import Duplicates
from streamsyn.scoring.examiner import (
    Findings,
    Opening,
    Scores,
    check_logprobs,
    is_draft_of,
    own_fleet,
    scoring_model,
)
from streamsyn.scoring.measures import AnswerPrompt, Question
from streamsyn.scoring.sidecar import FOLDER, MEASURES, Found, Measure, Row, Sidecar, with_scores
from streamsyn.shingles import Signature
from streamsyn.sink.rundir import DirectoryLock
from streamsyn.sink.snapshot import Snapshot
from streamsyn.telemetry import Counters

log = structlog.get_logger()

_Missing: TypeAlias = tuple[Row, list[Measure]]
Examine: TypeAlias = Callable[
    [Sequence[Path], EvalSets | None, Sequence[str]], Iterator[tuple[Signature, Overlap | None]]
]
"""Given sealed shards, evaluation data and the fields in which it is looked for: yields the signature of each
context and what it shares with that data, in the order of the log."""

_BATCH: Final = 64
_QUEUE: Final = 16
"""Contexts that are read ahead."""
_REJECT_NOTHING: Final = {"reject_gain_below": None, "reject_answer_below": None}
_LOG_EVERY_S: Final = 10.0


@dataclass(slots=True, kw_only=True)
class ScoreRequest:
    """What is to be measured.

    Attributes:
        root: The run directory.
        config: The run's configuration, or a changed one: `checks`, `scoring` and `fleet` are used.
        measures: What to measure.
        again: Measure anew what was measured with other settings.
        examine: Has other machines examine the texts of sealed shards; None: this process does.
        environ: The environment, which holds the servers' credentials.
        connect: The transport to servers; None is HTTP.
        runner: Runs the event loop; a different one simulates virtual time.
        rng: For jitter.
    """

    root: Path
    config: Config
    measures: Sequence[Measure] = MEASURES
    again: bool = False
    examine: Examine | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    connect: Connect | None = None
    runner: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run
    rng: Random | None = None


@dataclass(slots=True)
class ScoreSummary:
    """What was measured.

    Attributes:
        contexts: Contexts that the log held.
        measured: Contexts that this process has measured, by measure.
        skipped: Measures left out, with the reason.
        is_final: Whether the run is finished, so that no contexts follow.
        counters: The cost of asking servers.
    """

    contexts: int = 0
    measured: Counter[str] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)
    is_final: bool = False
    counters: Counters = field(default_factory=Counters)


def score(request: ScoreRequest) -> ScoreSummary:
    """Measure the contexts of a run directory.

    Raises:
        ConfigError: A setting, a server or a file of evaluation data cannot be used, or a different `score`
            is at work.
        SinkError: The log cannot be read, or the findings cannot be written.
        StoppedEarly: No server was usable for `fleet.give_up_s`; what was measured is kept.
    """
    folder = request.root / FOLDER
    try:
        make_folder(folder)
        lock = DirectoryLock(folder)
    except OSError as error:
        raise ConfigError(f"cannot make {folder}: {error.strerror}") from error
    summary, snapshot = ScoreSummary(), Snapshot(request.root)
    try:
        with closing(Sidecar(request.root)) as sidecar:
            contexts = Contexts(request, snapshot, sidecar)
            summary.contexts = contexts.number()
            final = snapshot.manifest.final
            summary.is_final = final is not None and final.get("contexts") == summary.contexts
            _compare_texts(contexts, summary)
            _ask_servers(contexts, summary)
    finally:
        lock.close()
    return summary


class Contexts:
    """The contexts of a snapshot, and what is still to be measured about them.

    Args:
        request: What to measure.
        snapshot: The log at one moment.
        sidecar: What was measured before.
    """

    def __init__(self, request: ScoreRequest, snapshot: Snapshot, sidecar: Sidecar) -> None:
        self.request = request
        self.sidecar = sidecar
        self._parts = snapshot.parts["contexts"]

    def number(self) -> int:
        """Number of contexts; reads the open shards."""
        return sum(
            part.sealed.rows if part.sealed is not None else sum(1 for _ in part.rows())
            for part in self._parts
        )

    def rows(self) -> Iterator[Row]:
        """The rows, in order."""
        return (row for part in self._parts for row in part.rows())

    def examined_from(self, seq: int, eval_sets: EvalSets | None, fields: Sequence[str]) -> "Examined":
        """What other machines find in the sealed shards from that of context `seq` on."""
        parts = [part for part in self._parts if part.sealed is not None and part.sealed.last_seq >= seq]
        if self.request.examine is None or not parts:
            return Examined(iter(()))
        first = parts[0].sealed
        assert first is not None, "left out above"
        found = self.request.examine([part.root / part.path for part in parts], eval_sets, fields)
        return Examined(enumerate(found, first.last_seq - first.rows + 1))

    def missing(self, wanted: Collection[Measure]) -> Iterator[list[_Missing]]:
        """What is to be measured, in batches."""
        rows = self.rows()
        while batch := list(islice(rows, _BATCH)):
            if some := self.sidecar.missing(batch, wanted):
                yield some


def _compare_texts(contexts: Contexts, summary: ScoreSummary) -> None:
    """The first pass: near-duplicates and leaks."""
    request, sidecar = contexts.request, contexts.sidecar
    checks, wanted = (
        request.config.checks,
        [one for one in request.measures if one in ("duplicates", "leaks")],
    )
    eval_sets: EvalSets | None = None
    if "leaks" in wanted and not checks.eval_sets:
        wanted.remove("leaks")
        summary.skipped.append("leaks: set checks.eval_sets to files of evaluation data")
    elif "leaks" in wanted:
        eval_sets = EvalSets(checks.eval_sets, checks.eval_ngram_words)
        sidecar.settle("leaks", {"checks.eval_sets": eval_sets.digest}, again=request.again)
    if not wanted:
        return
    index = request.root / FOLDER / "duplicates.sqlite"
    if "duplicates" in wanted:
        sidecar.settle("duplicates", {"checks.similarity": checks.similarity}, again=request.again)
        _drop_ahead(contexts, index)
    with closing(Duplicates(index, checks.similarity)) as duplicates:
        if "duplicates" in wanted:
            _catch_up(contexts, duplicates)
        texts = Texts(request.config, eval_sets, duplicates)
        examined: Examined | None = None
        for batch in contexts.missing(wanted):
            if examined is None:
                examined = contexts.examined_from(batch[0][0]["seq"], eval_sets, texts.fields)
            sidecar.add([one for row, measures in batch for one in texts.compare(row, measures, examined)])
            for row, measures in batch:
                summary.measured.update(measures)
                if "duplicates" in measures:  # it is in the sidecar: the index is never ahead of it
                    duplicates.logged(row["seq"], row["id"])


def _compared_up_to(contexts: Contexts) -> int | None:
    """The first context that was not compared with those before it; None if all were."""
    first = next(contexts.missing(["duplicates"]), None)
    return None if first is None else int(first[0][0]["seq"])


def _drop_ahead(contexts: Contexts, path: Path) -> None:
    """Delete an index that holds contexts which the sidecar, measured anew or cut short, does not."""
    end = _compared_up_to(contexts)
    if end is None or not path.exists():
        return
    with closing(Duplicates(path, contexts.request.config.checks.similarity)) as old:
        is_ahead = old.next_seq > end
    if is_ahead:
        for part in path.parent.glob(path.name + "*"):
            part.unlink()


def _catch_up(contexts: Contexts, duplicates: Duplicates) -> None:
    """Bring the index in line with what was compared before: the first contexts of the log, without gaps."""
    end = _compared_up_to(contexts)

    def compared(from_seq: int) -> Iterator[Row]:
        for row in with_scores(contexts.request.root, contexts.rows()):
            if end is not None and row["seq"] >= end:
                return
            if row["seq"] >= from_seq:
                yield row

    if not duplicates.catch_up(compared(duplicates.next_seq)):
        duplicates.catch_up(compared(0))


class Examined:
    """What was found about texts elsewhere, by the seq of their contexts.

    Args:
        found: In ascending order, without gaps.
    """

    def __init__(self, found: Iterator[tuple[int, tuple[Signature, Overlap | None]]]) -> None:
        self._found = found

    def of(self, seq: int) -> tuple[Signature, Overlap | None] | None:
        """Return what was found about a context, None if it is of no sealed shard. Ask in ascending order."""
        return next((one for number, one in self._found if number == seq), None)


class Texts:
    """Compares the texts of contexts.

    Args:
        config: The thresholds, and the recipe.
        eval_sets: Evaluation data; None where leaks are not looked for.
        duplicates: The contexts so far.
    """

    def __init__(self, config: Config, eval_sets: EvalSets | None, duplicates: Duplicates) -> None:
        self._section = config.checks
        self._takes_documents = load_recipe(config.recipe, config.checks).takes_documents
        self._eval_sets = eval_sets
        self._duplicates = duplicates

    @property
    def fields(self) -> Sequence[str]:
        """Where evaluation data is looked for: in what a model wrote. What the seed says was there before."""
        return ("context", "instruction", "answer") if self._takes_documents else ("context",)

    def compare(self, row: Row, measures: Collection[Measure], examined: Examined) -> Iterator[Found]:
        """Measure one context. Drafts that share the document of their seed do not repeat each other."""
        known = examined.of(row["seq"])
        for measure in measures:
            findings = Findings(self._section, {})
            if measure == "leaks" and self._eval_sets is not None:
                overlap = known[1] if known else self._eval_sets.overlap(written(row, self.fields))
                if overlap is not None:
                    findings.add_leak(overlap)
            elif measure == "duplicates":
                signed = known[0] if known else None
                match = self._duplicates.check_and_add(row["id"], row["context"], signed)
                is_shared = (
                    self._takes_documents and match is not None and is_draft_of(match.id, row["seed_id"])
                )
                if match is not None and not is_shared:
                    findings.add_duplicate(match)
            yield Found(row, measure, findings.checks, findings.flags)


def written(row: Row, fields: Sequence[str]) -> str:
    """Return the text of some fields of a context."""
    return "\n\n".join(str(row[name]) for name in fields)


def _ask_servers(contexts: Contexts, summary: ScoreSummary) -> None:
    """The second pass: context gain and answers."""
    wanted: list[Measure] = [one for one in contexts.request.measures if one in ("gain", "answers")]
    if not wanted:
        return
    try:
        contexts.request.runner(Asking(contexts, wanted, summary).run())
    except BaseExceptionGroup as errors:
        raise root_cause(errors) from None


class Asking:
    """Asks servers about contexts, as many at a time as the servers take.

    Args:
        contexts: The contexts.
        wanted: `gain`, `answers` or both.
        summary: Counts what is measured.
    """

    def __init__(self, contexts: Contexts, wanted: Sequence[Measure], summary: ScoreSummary) -> None:
        self._contexts = contexts
        self._wanted = wanted
        self._summary = summary
        self._config = contexts.request.config
        self._gone: str | None = None
        self._scores: dict[Measure, Scores] = {}

    async def run(self) -> None:
        """Measure all that is missing.

        Raises:
            ConfigError: The servers cannot measure it.
            FleetGone: No server was usable for `fleet.give_up_s`.
        """
        work: BoundedQueue[_Missing] = BoundedQueue(_QUEUE)
        try:
            async with self._fleet() as fleet, background() as tasks, asyncio.TaskGroup() as group:
                await self._prepare(fleet)
                tasks.start(self._report(), name="score-progress")
                reading = group.create_task(self._read(work), name="score-read")
                reading.add_done_callback(lambda _: work.close())
                self._keep_busy(fleet, group, work)
        except BaseException as error:
            if self._gone is not None and isinstance(root_cause(error), StoppedEarly):
                raise FleetGone(self._gone) from error
            raise

    @asynccontextmanager
    async def _fleet(self) -> AsyncIterator[Fleet]:
        request, config = self._contexts.request, self._config
        fleets: list[Fleet] = []

        def gone(reason: str) -> None:
            self._gone = reason
            for fleet in fleets:
                fleet.drain()

        opening: Opening = partial(
            open_fleet, on_gone=gone, environ=request.environ, connect=request.connect, rng=request.rng
        )
        if config.scoring.servers:
            async with own_fleet(config, opening) as fleet:
                fleets.append(fleet)
                yield fleet
        else:
            async with opening(config.fleet) as fleet:
                fleets.append(fleet)
                await fleet.ask_models()
                yield fleet

    async def _prepare(self, fleet: Fleet) -> None:
        """Check that the servers can measure what is wanted, with the settings of before."""
        scoring, checks = self._config.scoring, self._config.checks
        model = scoring_model(fleet, scoring.model)
        prompt = await asyncio.to_thread(AnswerPrompt, scoring.template)
        if "gain" in self._wanted:
            await check_logprobs(fleet, model)
        limits = {"gain": "answer_tokens", "answers": "max_answer_tokens"}
        for measure in self._wanted:
            limit = limits[measure]
            settings = {
                "scoring.model": model,
                "scoring.prompt": prompt.digest,
                f"scoring.{limit}": getattr(scoring, limit),
            }
            settle = partial(
                self._contexts.sidecar.settle, measure, settings, again=self._contexts.request.again
            )
            await asyncio.to_thread(settle)
            only = {"context_gain": measure == "gain", "answerable": measure == "answers"}
            section = checks.model_copy(update=only)
            self._scores[measure] = Scores(section, scoring, prompt, fleet, model, self._summary.counters)

    def _keep_busy(self, fleet: Fleet, group: asyncio.TaskGroup, work: BoundedQueue[_Missing]) -> None:
        """Start as many workers as the servers have places for, now and whenever there are more."""
        started = 0

        def grow() -> None:
            nonlocal started
            while started <= fleet.capacity and not work.closed:
                started += 1
                working = self._work(work)
                try:
                    group.create_task(working, name=f"score-{started}")
                except RuntimeError:  # the group is ending
                    working.close()
                    return

        fleet.on_room(grow)
        grow()

    async def _read(self, work: BoundedQueue[_Missing]) -> None:
        batches = self._contexts.missing(self._wanted)
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            for row, measures in batch:
                if left := _not_in_log(row, measures):
                    await work.put((row, left))

    async def _work(self, work: BoundedQueue[_Missing]) -> None:
        section = self._config.checks.model_copy(update=_REJECT_NOTHING)
        async for row, measures in work:
            question = Question(row["instruction"], row["answer"], row["task"])
            for measure in measures:  # the second one finds the context in the server's cache
                findings = Findings(section, {})
                await self._scores[measure].measure(findings, question, row["context"])
                if "unscored" in findings.flags:
                    continue  # the servers failed, which was logged: a later `score` asks again
                found = Found(row, measure, findings.checks, findings.flags)
                await asyncio.to_thread(self._contexts.sidecar.add, [found])
                self._summary.measured[measure] += 1

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_LOG_EVERY_S)
            log.info("score.progress", contexts=self._summary.contexts, **self._summary.measured)


def _not_in_log(row: Row, measures: Sequence[Measure]) -> list[Measure]:
    """Those of the measures that the run itself has not made while it wrote the context."""
    checks = row.get("checks") or {}
    names = {"gain": "context_gain", "answers": "answer_score"}
    return [measure for measure in measures if names[measure] not in checks]
