"""Workers: each an actor that takes one draft at a time and turns it into exactly one outcome."""

import asyncio
import time
import traceback
from collections.abc import Callable
from typing import Any

import structlog

from streamsyn.errors import (
    BrokenResponse,
    RequestRefused,
    ServerError,
    ServerTimeout,
    StoppedEarly,
)
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
    Work,
)
from streamsyn.sglang.fleet import Fleet

log = structlog.get_logger()


class Worker:
    """Takes work until there is none. All of its state is its own, and dies with it.

    Attributes:
        current: What it is at; it has no outcome yet.
        attempts: Tries at servers for it so far.
    """

    def __init__(self, recipe: Recipe, fleet: Fleet) -> None:
        self._recipe = recipe
        self._fleet = fleet
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
        except RejectedDraft as rejected:
            return self.reject(rejected.reason, rejected.detail)
        except ServerError as error:
            return self.reject(_reason(error), str(error))
        return self._context(item, document)

    async def _write(self, draft: Draft) -> Document:
        """Drive the recipe's conversation: it yields requests and is sent their completions."""
        steps = self._recipe.steps(draft)
        try:
            request = next(steps)
            while True:
                completion = await self._fleet.complete(request, self.attempts)
                request = steps.send(completion)
        except StopIteration as done:
            document: Document = done.value
            return document

    def _context(self, draft: Draft, document: Document) -> Context:
        seed, steps = draft.seed, document.steps
        last, tokens = steps[-1], sum(step.completion_tokens for step in steps)
        return Context(
            id=draft.id,
            seed_id=seed.id,
            draft=draft.number,
            task=seed.task,
            instruction=seed.instruction,
            answer=seed.answer,
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


class WorkerPool:
    """Keeps `size` workers going. One that falls over a bug is replaced; a run of bugs ends the run.

    Args:
        new_worker: Makes a worker.
        size: How many work at a time.
        max_consecutive_bugs: So many bugs, with no outcome in between, are raised.
        on_drain: Told when nothing new is to be started.
    """

    def __init__(
        self,
        new_worker: Callable[[], Worker],
        size: int,
        max_consecutive_bugs: int,
        on_drain: Callable[[], None] = lambda: None,
    ) -> None:
        self._new_worker = new_worker
        self._size = size
        self._max_bugs = max_consecutive_bugs
        self._bugs = 0
        self._on_drain = on_drain
        self.left_work = False
        """Whether a drain made workers put down what they were at."""

    def drain(self) -> None:
        """Finish only what is in flight."""
        self._on_drain()

    async def run(self, work: BoundedQueue[Work], results: BoundedQueue[Outcome]) -> None:
        """Work until `work` ends."""
        async with asyncio.TaskGroup() as pool:
            for number in range(self._size):
                pool.create_task(self._keep_one(work, results), name=f"worker-{number}")

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
                return

    async def _replaced(self, worker: Worker, bug: Exception, results: BoundedQueue[Outcome]) -> None:
        if worker.current is None:
            raise bug  # not over a seed: the queues themselves are broken
        self._bugs += 1
        log.error("worker.bug", item=_name(worker.current), bug=repr(bug), in_a_row=self._bugs)
        if self._bugs >= self._max_bugs:
            raise bug
        detail = "".join(traceback.format_exception(bug))
        await results.put(worker.reject(RejectReason.INTERNAL_ERROR, detail))

    def _no_bug(self) -> None:
        self._bugs = 0


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


def _name(item: Work) -> str:
    return item.origin if isinstance(item, BadSeed) else item.id
