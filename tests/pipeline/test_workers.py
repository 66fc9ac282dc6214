"""Workers: one draft in, exactly one outcome out, whatever happens on the way."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from streamsyn.config.sections import ChecksSection, FleetSection, RecipeSection, ScoringSection
from streamsyn.errors import root_cause
from streamsyn.fleet.fleet import Fleet, open_fleet
from streamsyn.pipeline.reject_limits import RejectLimits
from streamsyn.pipeline.workers import Results, Worker, WorkerPool
from streamsyn.queues import Backlog, BoundedQueue
from streamsyn.recipes.context import ContextRecipe
from streamsyn.recipes.recipe import Recipe, RejectedDraft, Steps
from streamsyn.recipes.sections_recipe import SectionsRecipe
from streamsyn.records import (
    BadSeed,
    Completion,
    Context,
    Document,
    Draft,
    Outcome,
    Reject,
    RejectReason,
    Request,
    Seed,
    Work,
    draft_key,
)
from streamsyn.scoring.examiner import Examiner, Scores
from streamsyn.scoring.measures import AnswerPrompt
from streamsyn.simulator.app import RunningSimulator, running
from streamsyn.simulator.settings import Fault, Script, SimulatorConfig
from streamsyn.sink.journal import Journal
from streamsyn.telemetry import Counters
from tests.builders import opened, rows, sink


def drafts(*names: str) -> list[Work]:
    """A draft for each name."""
    return [Draft(Seed(name, "qa", f"What of {name}?", f"{name} it is.", f"f:{name}")) for name in names]


RECIPE = ContextRecipe(RecipeSection(), ChecksSection())
PROMPT = AnswerPrompt()


class Buggy:
    """A recipe with a bug that shows with some seeds."""

    takes_documents = False

    def __init__(self, breaks: Callable[[str], bool]) -> None:
        self._breaks = breaks

    def fingerprint(self) -> dict[str, str]:
        """As that of the recipe without the bug."""
        return RECIPE.fingerprint()

    def group(self, seed: Seed) -> str:
        """As that of the recipe without the bug."""
        return RECIPE.group(seed)

    def outlook(self) -> str:
        """As that of the recipe without the bug."""
        return RECIPE.outlook()

    def steps(self, draft: Draft) -> Steps:
        """Hold the conversation, and stumble at its end."""
        document = yield from RECIPE.steps(draft)
        if self._breaks(draft.seed.id):
            raise KeyError(draft.seed.id)
        return document


@asynccontextmanager
async def fleet_at(script: Script, **section: float) -> AsyncIterator[tuple[Fleet, RunningSimulator]]:
    """A fleet of one simulator."""
    async with asyncio.timeout(20), running(SimulatorConfig(), script=script) as server:
        quick = {"backoff_base_s": 0.001, "probe_interval_s": 0.01, "request_timeout_s": 5.0, **section}
        settings = FleetSection.model_validate({"servers": [server.url], **quick})
        async with open_fleet(settings, lambda _: None) as fleet:
            await fleet.ask_models()
            yield fleet, server


async def worked(
    fleet: Fleet,
    items: Sequence[Work],
    recipe: Recipe = RECIPE,
    *,
    size: int = 1,
    max_bugs: int = 3,
    journal: Journal | None = None,
    is_draining: Callable[[], bool] = lambda: False,
    examiner: Examiner | None = None,
) -> list[Outcome]:
    """The outcomes of `items`, in the order in which they came."""
    work, results = BoundedQueue[Work](len(items) + 1), Backlog[Outcome](len(items) + 1)
    for item in items:
        await work.put(item)
    work.close()
    pool = WorkerPool(lambda: Worker(recipe, fleet, journal, is_draining, examiner), lambda: size, max_bugs)
    await pool.run(work, results)
    return results.get_nowait(len(items) + 1)


async def test_a_draft_becomes_a_context() -> None:
    """It holds the pair, the document, the server, and the tokens."""
    item = Draft(Seed("a", "qa", "Who?", "Ada.", "f:1", {"year": 1843}), 2)
    async with fleet_at([]) as (fleet, server):
        [context] = await worked(fleet, [item])
        stats = server.simulation.stats
    assert isinstance(context, Context)
    assert ("a#2", "a", 2, "qa", "Who?", "Ada.", "f:1", {"year": 1843}) == (
        context.id,
        context.seed_id,
        context.draft,
        context.task,
        context.instruction,
        context.answer,
        context.origin,
        context.metadata,
    )
    assert ("simulated", server.url, "default", "stop", stats.prompt_tokens, stats.completion_tokens, 0) == (
        context.model,
        context.server,
        context.weight_version,
        context.finish_reason,
        context.prompt_tokens,
        context.completion_tokens,
        context.wasted_tokens,
    )
    assert context.key == item.key
    assert len(context.context.split()) == context.checks["words"] > 100
    assert ([None], 1) == ([attempt.error for attempt in context.attempts], len(context.steps))


class Unwritable(Buggy):
    """A recipe that makes what the log cannot hold, with the seed `bad`."""

    def __init__(self, spoil: Callable[[Document], Document]) -> None:
        super().__init__(lambda _: False)
        self._spoil = spoil

    def steps(self, draft: Draft) -> Steps:
        """Hold the conversation, and spoil its document."""
        document = yield from RECIPE.steps(draft)
        return self._spoil(document) if draft.seed.id == "bad" else document


def in_checks(value: object) -> Callable[[Document], Document]:
    return lambda document: replace(document, checks={"value": value})


def logged(root: Path, outcomes: list[Outcome]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of contexts and rejects, when the outcomes are written in one batch."""
    with opened(root, sink()) as log:
        log.append(outcomes)
    return rows(root, "contexts"), rows(root, "rejects")


def refuse(_: Document) -> Document:
    raise RejectedDraft(RejectReason.EMPTY, "a lone \ud800")


def fail(_: Document) -> Document:
    raise ValueError("a lone \ud800")


@pytest.mark.parametrize(
    "spoil",
    [
        in_checks(np.float32(1)),
        in_checks({1, 2}),
        in_checks(Path("a")),
        in_checks(2**70),
        in_checks({1: "a"}),
        in_checks("\udcff"),
        lambda document: replace(document, text="\ud800 " + document.text),
        refuse,
        fail,
    ],
)
async def test_what_the_log_cannot_hold_costs_its_draft_alone(
    tmp_path: Path, spoil: Callable[[Document], Document]
) -> None:
    """Each draft has an outcome, and the log takes all of them in one batch."""
    async with fleet_at([]) as (fleet, _):
        outcomes = await worked(fleet, drafts("a", "bad", "b"), Unwritable(spoil))
    contexts, [reject] = await asyncio.to_thread(logged, tmp_path, outcomes)

    assert ["a", "b"] == [row["seed_id"] for row in contexts]
    assert ("bad", "internal_error") == (reject["seed_id"], reject["reason"])


async def test_tokens_of_discarded_answers_are_counted() -> None:
    """A short answer, then a good one: the first is wasted, and so are all tokens of a draft that fails."""
    async with fleet_at([Fault.SHORT]) as (fleet, server):
        [context] = await worked(fleet, drafts("a"))
        spent = server.simulation.stats.completion_tokens
    assert isinstance(context, Context)
    assert spent == context.completion_tokens + context.wasted_tokens
    assert 0 < context.wasted_tokens < context.completion_tokens
    async with fleet_at([Fault.SHORT] * 3) as (fleet, server):
        [reject] = await worked(fleet, drafts("a"))
        spent = server.simulation.stats.completion_tokens
    assert (spent, RejectReason.TOO_SHORT) == (reject.wasted_tokens, reject.reason)  # type: ignore[union-attr]


REASONS = {
    Fault.REFUSE: RejectReason.REQUEST_REFUSED,
    Fault.STALL: RejectReason.TIMEOUT,
    Fault.BAD_JSON: RejectReason.BROKEN_RESPONSE,
    Fault.HTTP_500: RejectReason.SERVER_UNAVAILABLE,
    Fault.EMPTY: RejectReason.EMPTY,
    Fault.REFUSAL: RejectReason.REFUSAL,
    Fault.REPETITION: RejectReason.REPETITION,
    Fault.QA: RejectReason.PROMPT_ECHO,
}


@pytest.mark.parametrize("fault", REASONS)
async def test_a_failure_becomes_a_reject(fault: Fault) -> None:
    """With its reason, the pair, and each try; nothing is raised, and the worker takes the next draft."""
    timeout_s = 0.3 if fault is Fault.STALL else 5.0  # only what stalls is to time out
    async with fleet_at(lambda _, __: fault, max_attempts=2, request_timeout_s=timeout_s) as (fleet, _):
        outcomes = await worked(fleet, drafts("a", "b"))
    rejects = [outcome for outcome in outcomes if isinstance(outcome, Reject)]
    assert [("a", "a", 0, draft_key("a", 0)), ("b", "b", 0, draft_key("b", 0))] == [
        (reject.id, reject.seed_id, reject.draft, reject.key) for reject in rejects
    ]
    allowed = {REASONS[fault]} | ({RejectReason.QA_PASTED} if fault is Fault.QA else set())
    assert {reject.reason for reject in rejects} <= allowed
    assert ("What of a?", "a it is.", "f:a") == (
        rejects[0].instruction,
        rejects[0].answer,
        rejects[0].origin,
    )
    assert all(reject.attempts and reject.detail for reject in rejects)


async def test_a_bad_line_flows_through() -> None:
    """It becomes a reject without a request."""
    bad = BadSeed("f:7", RejectReason.INVALID_JSON, "unexpected end", b"k" * 16)
    async with fleet_at([]) as (fleet, server):
        [reject] = await worked(fleet, [bad])
        assert 0 == server.simulation.stats.requests
    assert isinstance(reject, Reject)
    assert (bad.key, bad.origin, bad.reason, bad.detail, None) == (
        reject.key,
        reject.origin,
        reject.reason,
        reject.detail,
        reject.seed_id,
    )


def examiner_of(fleet: Fleet, **checks: float) -> Examiner:
    """One that has the fleet itself score."""
    section = ChecksSection.model_validate({"context_gain": True, **checks})
    return Examiner(section, scores=Scores(section, ScoringSection(), PROMPT, fleet, "simulated", Counters()))


async def test_what_was_written_is_examined() -> None:
    """The findings are in the context's checks; the scoring tries are not in its attempts."""
    async with fleet_at([]) as (fleet, server):
        [context] = await worked(fleet, drafts("a"), examiner=examiner_of(fleet))
        assert 3 == server.simulation.stats.requests
    assert isinstance(context, Context)
    assert {"words", "context_gain", "scoring", "flags"} <= context.checks.keys()
    assert (1, 0, 1) == (len(context.attempts), context.wasted_tokens, len(context.steps))


async def test_what_fails_its_examination_is_rejected() -> None:
    """With the reason, and with the tokens of writing it."""
    async with fleet_at([]) as (fleet, _):
        [reject] = await worked(fleet, drafts("a"), examiner=examiner_of(fleet, reject_gain_below=9))
    assert isinstance(reject, Reject)
    assert RejectReason.LOW_CONTEXT_GAIN == reject.reason
    assert "is below 9" in reject.detail
    assert (1, True) == (len(reject.attempts), reject.wasted_tokens > 0)


async def test_a_context_that_cannot_be_scored_is_kept() -> None:
    """A server that fails to score fails neither the draft nor the run."""
    refuses: Script = lambda _, body: Fault.REFUSE if "input_ids" in body else None  # noqa: E731
    async with fleet_at(refuses) as (fleet, _):
        outcomes = await worked(fleet, drafts("a", "b"), examiner=examiner_of(fleet))
    assert [["unscored"]] * 2 == [
        outcome.checks["flags"] for outcome in outcomes if isinstance(outcome, Context)
    ]


async def test_a_draft_that_drains_before_it_is_examined_is_put_down() -> None:
    """It has no outcome; the next run writes it again."""

    def drain(_: int, body: dict[str, object]) -> None:
        if "input_ids" not in body:
            fleet.drain()
            fleet.servers[0].limiter.cap = 0

    async with fleet_at(drain) as (fleet, _):
        assert [] == await worked(fleet, drafts("a"), examiner=examiner_of(fleet))


async def test_an_answer_that_waits_for_its_examination_is_kept(journal: Journal) -> None:
    """A drain or a kill comes before the servers have scored it: the next run does not ask for it again."""

    def drain(_: int, body: dict[str, object]) -> None:
        if "input_ids" not in body:
            fleet.drain()
            fleet.servers[0].limiter.cap = 0

    item = drafts("a")
    async with fleet_at(drain) as (fleet, _):
        assert [] == await worked(fleet, item, journal=journal, examiner=examiner_of(fleet))
    async with fleet_at([]) as (fleet, server):
        [context] = await worked(fleet, item, journal=journal, examiner=examiner_of(fleet))
        assert 0 == server.simulation.stats.by_route["/v1/chat/completions"]
    assert isinstance(context, Context)
    assert "context_gain" in context.checks


async def test_a_bug_costs_one_draft() -> None:
    """It becomes a reject with the traceback; a new worker replaces the failed one."""
    async with fleet_at([]) as (fleet, _):
        outcomes = await worked(fleet, drafts("a", "b", "c", "d", "e"), Buggy(lambda name: name in "bd"))
    by_kind = [outcome.reason if isinstance(outcome, Reject) else "context" for outcome in outcomes]
    assert ["context", "internal_error", "context", "internal_error", "context"] == by_kind
    bug = outcomes[1]
    assert isinstance(bug, Reject)
    assert [True] * 3 == ["Traceback" in bug.detail, "KeyError: 'b'" in bug.detail, bug.wasted_tokens > 0]
    assert 1 == len(bug.attempts)


async def test_the_detail_of_a_reject_is_short() -> None:
    """Whatever a plug-in's failure or exception says; the end of a traceback is kept."""

    def fail(name: str) -> bool:
        if name == "a":
            raise RejectedDraft(RejectReason.EMPTY, "long " * 1_000_000)
        raise ValueError("long " * 1_000_000)

    async with fleet_at([]) as (fleet, _):
        outcomes = await worked(fleet, drafts("a", "b"), Buggy(fail))
    for outcome in outcomes:
        assert isinstance(outcome, Reject)
        assert len(outcome.detail) <= 2048
        assert "long long" in outcome.detail
    bug = next(outcome for outcome in outcomes if getattr(outcome, "reason", "") == "internal_error")
    assert isinstance(bug, Reject)
    assert "raise ValueError" in bug.detail


async def test_a_run_of_bugs_ends_the_run() -> None:
    """After `max_consecutive_bugs` without an outcome in between, the bug itself is raised."""
    async with fleet_at([]) as (fleet, server):
        with pytest.raises(BaseExceptionGroup) as raised:
            await worked(fleet, drafts(*"abcdef"), Buggy(lambda _: True), max_bugs=3)
        assert 3 == server.simulation.stats.requests
    assert "KeyError('c')" == repr(root_cause(raised.value))


async def test_bugs_in_a_row_are_those_of_all_workers() -> None:
    """An outcome of any worker ends the row."""
    async with fleet_at([]) as (fleet, _):
        names = [f"{kind}{number}" for number in range(10) for kind in ("bug", "bug", "good")]
        made = Buggy(lambda name: name.startswith("bug"))
        assert 30 == len(await worked(fleet, drafts(*names), made, max_bugs=3))


async def test_each_draft_has_one_outcome() -> None:
    """With many workers, faults of all kinds and bugs among them."""
    names = [f"s{number}" for number in range(120)]
    kinds = [
        None,
        Fault.RESET,
        Fault.BAD_JSON,
        None,
        Fault.SHORT,
        Fault.HTTP_500,
        Fault.EMPTY,
        Fault.QUEUE_FULL,
    ]
    async with fleet_at(lambda number, _: kinds[number % 8], max_attempts=4, request_timeout_s=5) as (
        fleet,
        _,
    ):
        made = Buggy(lambda name: name.endswith("7"))
        outcomes = await worked(fleet, drafts(*names), made, size=16, max_bugs=100)
    assert sorted(names) == sorted(str(outcome.seed_id) for outcome in outcomes)
    assert 12 >= sum(
        isinstance(outcome, Reject) and outcome.reason is RejectReason.INTERNAL_ERROR for outcome in outcomes
    )


SECTIONS = SectionsRecipe(
    RecipeSection(use="sections", target_tokens=600, section_tokens=100), ChecksSection(min_words=10)
)
COLDER = SectionsRecipe(
    RecipeSection(use="sections", target_tokens=600, section_tokens=100, temperature=0.1),
    ChecksSection(min_words=10),
)
STEPS = 7
"""An outline and six sections; the simulator writes more than a section may have."""


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    """A journal."""
    opened = await asyncio.to_thread(Journal, tmp_path / "journal.sqlite")
    yield opened
    await asyncio.to_thread(opened.close)


def sections_of(outcome: Outcome) -> Context:
    """The context that an outcome is."""
    assert isinstance(outcome, Context), outcome
    return outcome


async def test_finished_steps_are_not_asked_again(journal: Journal) -> None:
    """A draft that stopped after three steps resumes with the fourth; its token counts include all steps."""
    refuse: Script = lambda number, _: Fault.REFUSE if number == 4 else None  # noqa: E731
    [item] = drafts("a")
    assert isinstance(item, Draft)
    async with fleet_at(refuse) as (fleet, server):
        [reject] = await worked(fleet, [item], SECTIONS, journal=journal)
        before = server.simulation.stats.completion_tokens
    assert isinstance(reject, Reject)
    kept = await asyncio.to_thread(journal.steps, item.key)
    assert 3 == len(kept)
    async with fleet_at([]) as (fleet, server):
        context = sections_of((await worked(fleet, [item], SECTIONS, journal=journal))[0])
        stats = server.simulation.stats
    assert STEPS - 3 == stats.requests
    assert STEPS == len(context.steps) == len(context.attempts)
    assert (before + stats.completion_tokens, 0) == (context.completion_tokens, context.wasted_tokens)
    assert kept[1].completion.text[:50] in context.context
    assert [kept[0].completion.server] == list({step["server"] for step in context.steps[:3]})


async def test_tries_of_a_finished_step_are_kept(journal: Journal) -> None:
    """Tokens discarded by an earlier run count as wasted once, and are not asked for again."""
    script = [None, Fault.EMPTY, Fault.SHORT, Fault.REFUSE]
    [item] = drafts("a")
    async with fleet_at(script) as (fleet, server):
        await worked(fleet, [item], SECTIONS, journal=journal)
        before = server.simulation.stats.completion_tokens
    async with fleet_at([]) as (fleet, server):
        context = sections_of((await worked(fleet, [item], SECTIONS, journal=journal))[0])
        stats = server.simulation.stats
    assert 3 + stats.requests == len(context.attempts)
    assert before + stats.completion_tokens == context.completion_tokens + context.wasted_tokens
    empty = 1
    assert len(context.attempts) - empty == len(context.steps)


async def test_a_step_whose_request_has_changed_is_asked_again(journal: Journal) -> None:
    """With a different prompt nothing in the journal matches; the new steps replace the old."""
    [item] = drafts("a")
    assert isinstance(item, Draft)
    async with fleet_at(lambda number, _: Fault.REFUSE if number == 5 else None) as (fleet, _):
        await worked(fleet, [item], SECTIONS, journal=journal)
    async with fleet_at(lambda number, _: Fault.REFUSE if number == 3 else None) as (fleet, server):
        await worked(fleet, [item], COLDER, journal=journal)
        assert 3 == server.simulation.stats.requests
    assert 2 == len(await asyncio.to_thread(journal.steps, item.key))
    async with fleet_at([]) as (fleet, server):
        sections_of((await worked(fleet, [item], COLDER, journal=journal))[0])
        assert STEPS - 2 == server.simulation.stats.requests


async def test_a_drain_puts_a_draft_down_between_two_steps(journal: Journal) -> None:
    """Its steps are kept, so nothing is lost; a draft at its last step is finished."""
    items = drafts("a", "b")
    async with fleet_at([]) as (fleet, server):
        stats = server.simulation.stats
        assert [] == await worked(
            fleet, items, SECTIONS, journal=journal, is_draining=lambda: stats.requests >= 3
        )
        assert 3 == stats.requests
        assert 1 == len(await worked(fleet, items[1:], journal=journal, is_draining=lambda: True))
        await worked(fleet, items, SECTIONS, journal=journal)
        assert 1 + 2 * STEPS == server.simulation.stats.requests


async def test_a_single_step_is_not_kept(journal: Journal) -> None:
    """The journal is only for drafts with more steps to come."""
    async with fleet_at([]) as (fleet, _):
        await worked(fleet, drafts("a", "b"), journal=journal)
    assert not journal.path.exists()


async def test_the_past_of_a_conversation_is_cached(journal: Journal) -> None:
    """Each step finds all of its prompt but the last question in the server's cache."""
    async with fleet_at([]) as (fleet, _):
        context = sections_of((await worked(fleet, drafts("a"), SECTIONS, journal=journal))[0])
    for before, after in pairwise(context.steps):
        past = before["prompt_tokens"] + before["completion_tokens"]
        assert after["cached_tokens"] >= past - 64
    assert context.cached_tokens > 0.7 * context.prompt_tokens


class Threads(Buggy):
    """A recipe that notes in which threads its steps run."""

    def __init__(self) -> None:
        super().__init__(lambda _: False)
        self.seen: list[threading.Thread] = []

    def steps(self, draft: Draft) -> Steps:
        """Ask once."""
        self.seen.append(threading.current_thread())
        answer = yield Request([{"role": "user", "content": "?"}], {}, "")
        self.seen.append(threading.current_thread())
        return Document(answer.text, {}, [answer])


class Answers:
    """A fleet that answers each request with the same text."""

    def __init__(self, text: str) -> None:
        self._text = text

    def model_of(self, _key: bytes) -> str:
        """The one model."""
        return "m"

    async def complete(self, *_: Any) -> Completion:
        """The text."""
        return Completion(self._text, "stop", 1, 0, 1, "m", "s")


@pytest.mark.parametrize("words", [100, 90_000])
async def test_long_texts_are_judged_in_a_thread(words: int) -> None:
    """The event loop would do nothing else while they are parsed and checked."""
    recipe, fleet = Threads(), Answers("word " * words)
    worker = Worker(recipe, cast("Fleet", fleet))
    work: BoundedQueue[Work] = BoundedQueue(1)
    results: Backlog[Outcome] = Backlog(1)
    await work.put(drafts("one")[0])
    work.close()

    await worker.run(work, Results(results, RejectLimits()), lambda: True)

    first, last = recipe.seen
    assert first is threading.main_thread()
    assert (last is first) == (words == 100)
    assert isinstance(results.get_nowait(1)[0], Context)
