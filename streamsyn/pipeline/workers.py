"""Workers and their pool: a worker takes one draft at a time and turns it into exactly one outcome.

The pool keeps as many workers as the fleet has places for, and replaces a worker that fails with a bug.
"""

import asyncio
import math
import time
import traceback
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from streamsyn.answer_text import has_control_tokens, has_marks
from streamsyn.config.sections import RecipeSection
from streamsyn.errors import (
    BrokenResponse,
    RateLimited,
    RequestRefused,
    ServerError,
    ServerTimeout,
    StoppedEarly,
)
from streamsyn.fleet.fleet import Fleet
from streamsyn.fleet.thinking import Thinking
from streamsyn.pipeline.reject_limits import RejectLimits
from streamsyn.plain_text import MAX_MESSAGE_BYTES, cut
from streamsyn.queues import Backlog, BoundedQueue
from streamsyn.recipes.recipe import Recipe, RejectedDraft
from streamsyn.records import (
    Attempt,
    BadSeed,
    Completion,
    Context,
    Document,
    Draft,
    Outcome,
    Reject,
    RejectReason,
    Request,
    Work,
)
from streamsyn.sink.journal import FinishedStep, Journal, request_digest
from streamsyn.sink.log import encode_row
from streamsyn.telemetry import Value, span

if TYPE_CHECKING:
    from streamsyn.scoring.examiner import Examiner

log = structlog.get_logger()

_LINE_BYTES = MAX_MESSAGE_BYTES // 4
"""Longest line of a traceback: the text of an exception may be of any length."""
_REJECT_TEXTS = ("detail", "origin", "task", "instruction", "answer")
_SURPLUS = 1.25
"""A pool shrinks when it has this many times the workers that it should have."""
_LONG_CHARS = 2**15
"""Characters of a draft from which its recipe works in a thread. Parsing and checking more may take longer
than 10 ms, during which the event loop would neither send nor receive."""


class Worker:
    """Takes work until there is none. It shares no state with other workers.

    Args:
        recipe: What to ask for a draft.
        fleet: The servers to ask.
        journal: Keeps the finished steps of drafts with several steps; without it, a kill loses them.
        is_draining: Whether the run drains: then a draft is put down after a step that the journal keeps.
        examiner: Examines what was written, if the configuration asks for it.
        thinking: Switches the thinking of models.

    Attributes:
        current: The item it works on; None between items.
        attempts: Tries at servers for this item so far.
    """

    def __init__(
        self,
        recipe: Recipe,
        fleet: Fleet,
        journal: Journal | None = None,
        is_draining: Callable[[], bool] = lambda: False,
        examiner: "Examiner | None" = None,
        thinking: Thinking | None = None,
    ) -> None:
        self._recipe = recipe
        self._thinking = thinking or Thinking(RecipeSection())
        self._fleet = fleet
        self._journal = journal
        self._is_draining = is_draining
        self._examiner = examiner
        self.current: Work | None = None
        self.attempts: list[Attempt] = []

    async def run(self, work: BoundedQueue[Work], results: "Results", goes_on: Callable[[], bool]) -> bool:
        """Put one outcome on `results` for each item of `work`; an item is begun when `results` has room.

        Args:
            work: The items.
            results: Takes the outcomes.
            goes_on: Called after each item; False ends the worker.

        Returns:
            Whether `work` has ended.

        Raises:
            StoppedEarly: The run drains, and an item was not begun or was put down between two steps.
        """
        async for item in work:
            await results.room()
            self.current, self.attempts = item, []
            outcome = await self._traced_outcome(item)
            encode_row(0, outcome)  # what the log cannot hold is a bug of this draft alone: it raises here
            self.current = None
            results.put(outcome)  # never waits: what was answered is written, whatever else is slow
            if not goes_on():
                return False
        return True

    @property
    def _tokens(self) -> int:
        """Completion tokens that servers have spent on the current item."""
        return sum(attempt.completion_tokens for attempt in self.attempts)

    async def _traced_outcome(self, item: Work) -> Outcome:
        if isinstance(item, BadSeed):
            return await self._outcome(item)
        attributes: dict[str, Value] = {
            "seed.id": item.seed.id,
            "seed.task": item.seed.task,
            "draft.number": item.number,
        }
        with span("draft", attributes) as opened:
            outcome = await self._outcome(item)
            reason = {"reject.reason": str(outcome.reason)} if isinstance(outcome, Reject) else {}
            opened.set(
                {
                    "outcome.kind": type(outcome).__name__.lower(),
                    "outcome.completion_tokens": getattr(outcome, "completion_tokens", 0),
                    "outcome.wasted_tokens": outcome.wasted_tokens,
                    **reason,
                }
            )
        return outcome

    async def _outcome(self, item: Work) -> Outcome:
        if isinstance(item, BadSeed):
            return self.reject(item.reason, item.detail)
        try:
            document = await self._write(item)
            if self._examiner is not None:
                document = await self._examiner.examine(item, document)
        except RejectedDraft as rejected:
            return self.reject(rejected.reason, rejected.detail)
        except ServerError as error:
            return self.reject(_reason(error), str(error))
        return self._context(item, document)

    async def _write(self, draft: Draft) -> Document:
        """Drive the recipe, which yields requests and is sent their completions.

        Steps that an earlier run finished are answered from the journal, with their tries, and count as if
        they had been asked now.
        """
        model = self._fleet.model_of(draft.key)
        steps = _DrivenSteps(self._recipe, draft, self._thinking, model)
        made, number = await steps.next(), 0
        for finished in await self._finished_steps(draft):
            if isinstance(made, Document) or finished.request_digest != request_digest(made):
                break  # the request has changed: this step and the later ones are asked again
            self.attempts += finished.attempts
            made, number = await steps.next(finished.completion), number + 1
        while isinstance(made, Request):
            before = len(self.attempts)
            asked = replace(made, task=draft.seed.task)
            with span("step", {"step.number": number, "gen_ai.request.model": model}):
                completion = await self._fleet.complete(asked, self.attempts, model)
            made = await steps.next(completion)
            if isinstance(made, Document) and not (self._examiner and self._examiner.asks_servers):
                break  # the log holds it next
            is_kept = await self._keep(draft, number, asked, completion, self.attempts[before:])
            if is_kept and self._is_draining():
                raise StoppedEarly("draining: the next run resumes with the next step")
            number += 1
        return made

    async def _finished_steps(self, draft: Draft) -> list[FinishedStep]:
        if self._journal is None or not self._journal.holds(draft.key):
            return []
        return await asyncio.to_thread(self._journal.steps, draft.key)

    async def _keep(
        self, draft: Draft, number: int, asked: Request, answer: Completion, tries: list[Attempt]
    ) -> bool:
        """Keep a step in the journal, so that a kill does not lose it; returns whether it was kept."""
        journal = self._journal
        if journal is None:
            return False
        with span("journal", {"step.number": number}):
            return await asyncio.to_thread(
                lambda: journal.add(draft.key, number, request_digest(asked), answer, tries)
            )

    def _context(self, draft: Draft, document: Document) -> Context:
        seed, steps = draft.seed, document.steps
        last, tokens = steps[-1], sum(step.completion_tokens for step in steps)
        return Context(
            supersedes=draft.supersedes,
            id=draft.id,
            seed_id=seed.id,
            draft=draft.number,
            task=seed.task,
            instruction=seed.instruction if document.instruction is None else document.instruction,
            answer=seed.answer if document.answer is None else document.answer,
            context=document.text,
            model=last.model,
            server=last.server,
            weight_version=last.weight_version,
            finish_reason=last.finish_reason,
            prompt_tokens=sum(step.prompt_tokens for step in steps),
            cached_tokens=sum(step.cached_tokens for step in steps),
            completion_tokens=tokens,
            thinking_tokens=sum(step.thinking_tokens for step in steps),
            wasted_tokens=self._tokens - tokens,
            attempts=self.attempts,
            steps=[_step_row(step) for step in steps],
            checks=document.checks,
            origin=seed.origin,
            metadata=seed.metadata,
            written_at=time.time(),
        )

    def reject(self, reason: RejectReason, detail: str) -> Reject:
        """The reject for the current item."""
        detail = cut(detail)
        if isinstance(self.current, BadSeed):
            bad = self.current
            return Reject(
                key=bad.key, reason=reason, detail=detail, origin=bad.origin, written_at=time.time()
            )
        assert self.current is not None, "a worker rejects only its current item"
        draft, seed = self.current, self.current.seed
        if self._examiner is not None:
            self._examiner.forget(draft)
        return Reject(
            supersedes=draft.supersedes,
            key=draft.key,
            reason=reason,
            detail=detail,
            origin=seed.origin,
            id=draft.id,
            seed_id=seed.id,
            draft=draft.number,
            task=seed.task,
            instruction=seed.instruction,
            answer=seed.answer,
            wasted_tokens=self._tokens,
            attempts=self.attempts,
            metadata=seed.metadata,
            written_at=time.time(),
        )


class _DrivenSteps:
    """The steps of a draft: completions in, requests out, then the document. Long ones run in a thread."""

    def __init__(self, recipe: Recipe, draft: Draft, thinking: Thinking, model: str) -> None:
        self._steps = recipe.steps(draft)
        self._thinking = thinking
        self._model = model
        self._chars = len(draft.seed.context)

    async def next(self, completion: Completion | None = None) -> Request | Document:
        """Return the next request, or the document.

        Args:
            completion: The answer to the request before; None at the start.

        Raises:
            RejectedDraft: No answer can be used.
        """
        if completion is not None:
            self._thinking.answered(completion)
            self._chars += len(completion.text)
        if self._chars < _LONG_CHARS:
            return self._advance(completion)
        return await asyncio.to_thread(self._advance, completion)

    def _advance(self, completion: Completion | None) -> Request | Document:
        try:
            request = next(self._steps) if completion is None else self._steps.send(completion)
        except StopIteration as done:  # which no thread can pass on
            return _flagged(done.value)
        return self._thinking.request(request, self._model)


def _reason(error: ServerError) -> RejectReason:
    match error:
        case RequestRefused() | RateLimited():
            return RejectReason.REQUEST_REFUSED
        case ServerTimeout():
            return RejectReason.TIMEOUT
        case BrokenResponse():
            return RejectReason.BROKEN_RESPONSE
        case _:
            return RejectReason.SERVER_UNAVAILABLE


def _flagged(document: Document) -> Document:
    """The document, with a flag if it spells out control tokens or marks of thoughts."""
    written = (document.text, document.instruction, document.answer)
    if not any(has_control_tokens(text) or has_marks(text) for text in written if text):
        return document
    flags = [*document.checks.get("flags", ()), "control_tokens"]
    return replace(document, checks={**document.checks, "flags": flags})


def _step_row(step: Completion) -> dict[str, Any]:
    return {
        "finish_reason": step.finish_reason,
        "prompt_tokens": step.prompt_tokens,
        "cached_tokens": step.cached_tokens,
        "completion_tokens": step.completion_tokens,
        "thinking_tokens": step.thinking_tokens,
        "server": step.server,
        **({"cached_host_tokens": step.cached_host_tokens} if step.cached_host_tokens else {}),
        **({"cached_storage_tokens": step.cached_storage_tokens} if step.cached_storage_tokens else {}),
        **({"tokens_estimated": True} if step.tokens_estimated else {}),
        **({"body": step.body} if step.body is not None else {}),
    }


class Results:
    """Takes the outcomes of workers, as far as `limits` lets rejects be written."""

    def __init__(self, queue: Backlog[Outcome], limits: RejectLimits) -> None:
        self._queue = queue
        self._limits = limits

    async def room(self) -> None:
        """Wait for room before an item is begun; see `Backlog.room`."""
        await self._queue.room()
        self._limits.began()

    def put(self, outcome: Outcome) -> None:
        """Take an outcome."""
        if isinstance(outcome, Reject):
            written: list[Outcome] = [*self._limits.reject(outcome)]
        else:
            written = [*self._limits.context(), outcome]
        for one in written:
            self._queue.put(one)


class WorkerPool:
    """Keeps workers running. A worker that fails with a bug is replaced; bugs in a row end the run.

    Args:
        new_worker: Makes a worker.
        size: Returns how many workers there should be; called at the start, and by `grow`.
        max_consecutive_bugs: Number of bugs, with no outcome in between, after which the bug is raised.
        on_drain: Called when the run starts to drain.
        on_idle: Called when a worker finds no more work, with the number of workers still at work and the
            number that were started.
        limits: Holds back the first rejects, and stops a run with too many; None accepts any.
        shrinks: Whether workers end after their item when there are clearly more of them than `size`.

    Attributes:
        left_work: Whether workers put drafts down because of a drain.
    """

    def __init__(
        self,
        new_worker: Callable[[], Worker],
        size: Callable[[], int],
        max_consecutive_bugs: int,
        on_drain: Callable[[], None] = lambda: None,
        on_idle: Callable[[int, int], None] = lambda _left, _of: None,
        limits: RejectLimits | None = None,
        *,
        shrinks: bool = False,
    ) -> None:
        self._new_worker = new_worker
        self._size = size
        self._max_bugs = max_consecutive_bugs
        self._bugs = 0
        self._on_drain = on_drain
        self._on_idle = on_idle
        self._limits = limits or RejectLimits()
        self._shrinks = shrinks
        self._start: Callable[[int], None] | None = None
        self._work: BoundedQueue[Work] | None = None
        self._started = self._ended = 0
        self._is_draining = False
        self.left_work = False

    def drain(self) -> None:
        """Start nothing new; finish only what is in flight."""
        self._start, self._is_draining = None, True
        self._on_drain()

    def not_begun(self) -> float:
        """Return how many items no worker has taken; infinity until all have been read."""
        return math.inf if self._work is None or not self._work.closed else len(self._work)

    def grow(self) -> None:
        """Start workers up to the present `size`.

        Surplus workers wait for a place at a server, which costs only the draft that each holds.
        """
        while self._start is not None and self._started < self._size():
            self._started += 1
            self._start(self._started)

    async def run(self, work: BoundedQueue[Work], results: Backlog[Outcome]) -> None:
        """Run workers until `work` ends."""
        self._work = work
        context = copy_context()  # of this run: what calls `grow` may belong to a different one
        limited = Results(results, self._limits)

        async with asyncio.TaskGroup() as pool:

            def start(number: int) -> None:
                working = self._keep_one(work, limited)
                try:
                    pool.create_task(working, name=f"worker-{number}", context=context.copy())
                except RuntimeError:  # the pool is ending
                    working.close()

            self._start = start
            self.grow()
        self.left_work = self.left_work or (self._is_draining and self._limits.holds_any)
        for reject in self._limits.end(drop=self._is_draining):
            results.put(reject)

    async def _keep_one(self, work: BoundedQueue[Work], results: Results) -> None:
        while True:
            worker = self._new_worker()
            try:
                has_ended = await worker.run(work, results, self._goes_on)
            except StoppedEarly:
                self.left_work = True
                return
            except Exception as bug:  # noqa: BLE001 - whatever it is, it must not end the run
                self._reject_after_bug(worker, bug, results)
            else:
                if not has_ended:
                    self._started -= 1
                    return
                self._start = None  # no work is left for further workers
                self._ended += 1
                self._on_idle(self._started - self._ended, self._started)
                return

    def _reject_after_bug(self, worker: Worker, bug: Exception, results: Results) -> None:
        if worker.current is None:
            self._start = None
            raise bug  # not caused by a seed: the queues themselves are broken
        self._bugs += 1
        log.error("worker.bug", item=_name(worker.current), bug=repr(bug), in_a_row=self._bugs)
        if self._bugs >= self._max_bugs:
            self._start = None
            raise bug
        lines = [cut(line, _LINE_BYTES) for line in traceback.format_exception(bug)]
        detail = "".join(lines)[-MAX_MESSAGE_BYTES:]  # the end says what happened
        results.put(_loggable(worker.reject(RejectReason.INTERNAL_ERROR, detail)))

    def _goes_on(self) -> bool:
        """Note an outcome. Return whether its worker is still needed."""
        self._bugs = 0
        return not self._shrinks or self._started - self._ended <= _SURPLUS * self._size()


def _loggable(reject: Reject) -> Reject:
    """The reject with its texts and metadata as the log can hold them, which the bug may have spoiled."""
    try:
        encode_row(0, reject)
    except TypeError:  # orjson.JSONEncodeError is one
        attempts = [replace(attempt, error=_plain(attempt.error)) for attempt in reject.attempts]
        texts: dict[str, Any] = {name: _plain(getattr(reject, name)) for name in _REJECT_TEXTS}
        return replace(reject, **texts, metadata={}, attempts=attempts)
    return reject


def _plain(text: str | None) -> str | None:
    """The text with lone surrogates, which UTF-8 does not have, written as escapes."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def _name(item: Work) -> str:
    return item.origin if isinstance(item, BadSeed) else item.id
