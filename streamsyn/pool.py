"""Keeps workers going: as many as the fleet has places for, each replaced when it falls over a bug."""

import asyncio
import traceback
from collections.abc import Callable

import structlog

from streamsyn.errors import StoppedEarly
from streamsyn.queues import BoundedQueue
from streamsyn.records import BadSeed, Outcome, RejectReason, Work
from streamsyn.workers import Worker

log = structlog.get_logger()


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
