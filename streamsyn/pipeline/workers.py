"""Workers: each an actor that takes one draft at a time and turns it into exactly one outcome.

Keeps workers going: as many as the fleet has places for, each replaced when it falls over a bug.
"""

import asyncio
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import structlog

from streamsyn.errors import BrokenResponse, RequestRefused, ServerError, ServerTimeout, StoppedEarly
from streamsyn.fleet.fleet import Fleet
from streamsyn.queues import BoundedQueue
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

if TYPE_CHECKING:
    from streamsyn.scoring.examiner import Examiner

log = structlog.get_logger()


class Worker:
    """Takes work until there is none. All of its state is its own, and dies with it.

    Args:
        recipe: What to ask.
        fleet: Whom to ask.
        journal: Keeps the finished steps of a draft that has more of them; without one a kill costs them.
        is_draining: Whether nothing new is to be started; then a draft whose steps are kept is put down.
        examiner: Looks at what was written, if that is wanted.

    Attributes:
        current: What it is at; it has no outcome yet.
        attempts: Tries at servers for it so far.
    """

    def __init__(
        self,
        recipe: Recipe,
        fleet: Fleet,
        journal: Journal | None = None,
        is_draining: Callable[[], bool] = lambda: False,
        examiner: "Examiner | None" = None,
    ) -> None:
        self._recipe = recipe
        self._fleet = fleet
        self._journal = journal
        self._is_draining = is_draining
        self._examiner = examiner
        self.current: Work | None = None
        self.attempts: list[Attempt] = []

    async def run(
        self, work: BoundedQueue[Work], results: BoundedQueue[Outcome], on_outcome: Callable[[], None]
    ) -> None:
        """Put one outcome on `results` for each item of `work`."""
        async for item in work:
            self.current, self.attempts = item, []
            outcome = await self._outcome(item)
            self.current = None
            on_outcome()
            await results.put(outcome)

    @property
    def _tokens(self) -> int:
        """Completion tokens that servers have spent on it so far."""
        return sum(attempt.completion_tokens for attempt in self.attempts)

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
        """Drive the recipe's conversation: it yields requests and is sent their completions.

        Steps that an earlier run finished are played to it from the journal, tries and all; they are in
        the figures as if they had been asked now, once.
        """
        steps, model = self._recipe.steps(draft), self._fleet.model_of(draft.key)
        try:
            request, number = next(steps), 0
            for finished in await self._finished_steps(draft):
                if finished.request_digest != request_digest(request):
                    break  # the rest are answers to something else; the next step takes their place
                self.attempts += finished.attempts
                request, number = steps.send(finished.completion), number + 1
            while True:
                before = len(self.attempts)
                completion = await self._fleet.complete(request, self.attempts, model)
                asked, request = request, steps.send(completion)
                is_kept = await self._keep(draft, number, asked, completion, self.attempts[before:])
                if is_kept and self._is_draining():
                    raise StoppedEarly("draining: the next run goes on with the next step")
                number += 1
        except StopIteration as done:
            document: Document = done.value
            return document

    async def _finished_steps(self, draft: Draft) -> list[FinishedStep]:
        if self._journal is None or not self._journal.holds(draft.key):
            return []
        return await asyncio.to_thread(self._journal.steps, draft.key)

    async def _keep(
        self, draft: Draft, number: int, asked: Request, answer: Completion, tries: list[Attempt]
    ) -> bool:
        """Keep a step that is not the last, so that a kill does not cost it."""
        journal = self._journal
        if journal is None:
            return False
        return await asyncio.to_thread(
            lambda: journal.add(draft.key, number, request_digest(asked), answer, tries)
        )

    def _context(self, draft: Draft, document: Document) -> Context:
        seed, steps = draft.seed, document.steps
        last, tokens = steps[-1], sum(step.completion_tokens for step in steps)
        return Context(
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
            wasted_tokens=self._tokens - tokens,
            attempts=self.attempts,
            steps=[_figures(step) for step in steps],
            checks=document.checks,
            origin=seed.origin,
            metadata=seed.metadata,
            written_at=time.time(),
        )

    def reject(self, reason: RejectReason, detail: str) -> Reject:
        """The reject for what the worker is at."""
        if isinstance(self.current, BadSeed):
            bad = self.current
            return Reject(
                key=bad.key, reason=reason, detail=detail, origin=bad.origin, written_at=time.time()
            )
        assert self.current is not None, "a worker rejects only what it is at"
        draft, seed = self.current, self.current.seed
        return Reject(
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


def _reason(error: ServerError) -> RejectReason:
    match error:
        case RequestRefused():
            return RejectReason.REQUEST_REFUSED
        case ServerTimeout():
            return RejectReason.TIMEOUT
        case BrokenResponse():
            return RejectReason.BROKEN_RESPONSE
        case _:
            return RejectReason.SERVER_UNAVAILABLE


def _figures(step: Completion) -> dict[str, Any]:
    return {
        "finish_reason": step.finish_reason,
        "prompt_tokens": step.prompt_tokens,
        "cached_tokens": step.cached_tokens,
        "completion_tokens": step.completion_tokens,
        "server": step.server,
    }


class WorkerPool:
    """Keeps workers going. One that falls over a bug is replaced; a run of bugs ends the run.

    Args:
        new_worker: Makes a worker.
        size: How many should work at a time; asked at the start, and again by `grow`.
        max_consecutive_bugs: So many bugs, with no outcome in between, are raised.
        on_drain: Told when nothing new is to be started.
        on_idle: Told when a worker finds no more work: how many are left, of how many at the most.
    """

    def __init__(
        self,
        new_worker: Callable[[], Worker],
        size: Callable[[], int],
        max_consecutive_bugs: int,
        on_drain: Callable[[], None] = lambda: None,
        on_idle: Callable[[int, int], None] = lambda _left, _of: None,
    ) -> None:
        self._new_worker = new_worker
        self._size = size
        self._max_bugs = max_consecutive_bugs
        self._bugs = 0
        self._on_drain = on_drain
        self._on_idle = on_idle
        self._start: Callable[[int], None] | None = None
        self._started = self._ended = 0
        self.left_work = False
        """Whether a drain made workers put down what they were at."""

    def drain(self) -> None:
        """Finish only what is in flight."""
        self._start = None
        self._on_drain()

    def grow(self) -> None:
        """Start as many workers as there should be now; a pool that should be smaller stays as it is.

        Workers that are too many wait for a place at a server, which costs nothing but the seed they hold.
        """
        while self._start is not None and self._started < self._size():
            self._started += 1
            self._start(self._started)

    async def run(self, work: BoundedQueue[Work], results: BoundedQueue[Outcome]) -> None:
        """Work until `work` ends."""
        async with asyncio.TaskGroup() as pool:

            def start(number: int) -> None:
                working = self._keep_one(work, results)
                try:
                    pool.create_task(working, name=f"worker-{number}")
                except RuntimeError:  # the pool is ending
                    working.close()

            self._start = start
            self.grow()

    async def _keep_one(self, work: BoundedQueue[Work], results: BoundedQueue[Outcome]) -> None:
        while True:
            worker = self._new_worker()
            try:
                await worker.run(work, results, self._no_bug)
            except StoppedEarly:
                self.left_work = True
                return
            except Exception as bug:  # noqa: BLE001 - whatever it is, it must not take the run with it
                await self._replaced(worker, bug, results)
            else:
                self._start = None  # there is no work for more
                self._ended += 1
                self._on_idle(self._started - self._ended, self._started)
                return

    async def _replaced(self, worker: Worker, bug: Exception, results: BoundedQueue[Outcome]) -> None:
        if worker.current is None:
            self._start = None
            raise bug  # not over a seed: the queues themselves are broken
        self._bugs += 1
        log.error("worker.bug", item=_name(worker.current), bug=repr(bug), in_a_row=self._bugs)
        if self._bugs >= self._max_bugs:
            self._start = None
            raise bug
        detail = "".join(traceback.format_exception(bug))
        await results.put(worker.reject(RejectReason.INTERNAL_ERROR, detail))

    def _no_bug(self) -> None:
        self._bugs = 0


def _name(item: Work) -> str:
    return item.origin if isinstance(item, BadSeed) else item.id
