"""The sink stage: takes outcomes, writes them to the log, and passes contexts on once they are synced.

Outcomes are written as they arrive, whatever the stages behind are doing, so that a kill loses none that was
answered. The log is synced every `sink.sync_interval_s`, in a different thread, and only then does a context
go to assembly. A slow disk or assembly makes workers wait before they begin a draft.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from streamsyn.config.sections import SinkSection
from streamsyn.queues import Backlog, BoundedQueue
from streamsyn.records import Context, DurableContext, Outcome, Reject
from streamsyn.sink.log import RunLog
from streamsyn.telemetry import Counters

_MAX_BATCH = 256
_GATHER_S = 0.005
"""Writes begin at least this long after each other: outcomes that arrive in between are written together."""


class OutcomeWriter:
    """Writes outcomes from `results` until its end; passes contexts to `durable` once they are synced.

    Args:
        log: The log.
        sink: When to sync.
        counters: Counts the outcomes.
        on_durable: Called with each context that is synced, in the order of `seq`; must not block.

    Raises (from `run`):
        SinkError: The log cannot be written.
    """

    def __init__(
        self,
        log: RunLog,
        sink: SinkSection,
        counters: Counters,
        on_durable: Callable[[int, Context], None] = lambda _seq, _context: None,
    ) -> None:
        self._log = log
        self._sink = sink
        self._counters = counters
        self._on_durable = on_durable
        self._written: deque[tuple[int, Outcome]] = deque()
        """Outcomes that were written and not passed on; `results` bounds them."""
        self._rows = 0
        """Outcomes written."""
        self._synced = self._syncing = 0
        """Outcomes synced; outcomes synced once the sync in progress is done."""
        self._ended = False
        self._all_written: asyncio.Future[None]
        self._write_timer: asyncio.TimerHandle | None = None
        self._may_write_at = 0.0
        """Seconds of the event loop."""
        self._is_writing = False
        """Whether the thread is writing."""
        self._writes = 0
        """Writes whose outcomes are not noted yet."""
        self._sync_soon = asyncio.Event()
        self._sync_now = asyncio.Event()
        self._have_synced = asyncio.Event()
        # Threads of its own: one of all may be taken by a slow reader, and a sync must not delay a write.
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="sink-write")
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="sink-sync")

    async def run(self, results: Backlog[Outcome], durable: BoundedQueue[DurableContext]) -> None:
        """Write until `results` ends, then sync the rest."""
        try:
            async with asyncio.TaskGroup() as group:
                writing = group.create_task(self._write(results), name="sink-write")
                writing.add_done_callback(lambda _: self._end())
                group.create_task(self._sync(), name="sink-sync")
                group.create_task(self._pass_on(results, durable), name="sink-pass-on")
        finally:
            # After an error, a call in progress ends before the log is closed.
            await asyncio.to_thread(self._writing.shutdown)
            await asyncio.to_thread(self._disk.shutdown)

    async def _write(self, results: Backlog[Outcome]) -> None:
        """Have the thread write until `results` ends.

        `put` begins a write by itself: an event loop with hundreds of answers to look at would begin it late,
        and a kill would lose them.
        """
        self._all_written = asyncio.get_running_loop().create_future()
        results.on_change = partial(self._begin_write, results)
        try:
            self._begin_write(results)
            await self._all_written
        finally:
            results.on_change = _nothing
            if self._write_timer is not None:
                self._write_timer.cancel()

    def _begin_write(self, results: Backlog[Outcome]) -> None:
        """Begin a write, now or as soon as the last one began `_GATHER_S` ago."""
        if self._is_writing:
            return  # what it leaves, `put` or its end writes
        if not len(results):
            if results.closed and not self._writes and not self._all_written.done():
                self._all_written.set_result(None)
            return
        loop = asyncio.get_running_loop()
        if loop.time() >= self._may_write_at:
            self._begin_now(results)
        elif self._write_timer is None:
            self._write_timer = loop.call_at(self._may_write_at, self._begin_now, results)

    def _begin_now(self, results: Backlog[Outcome]) -> None:
        loop = asyncio.get_running_loop()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        self._may_write_at, self._is_writing = loop.time() + _GATHER_S, True
        self._writes += 1
        writing = loop.run_in_executor(self._writing, self._append_all, results)
        writing.add_done_callback(partial(self._note_written, results))

    def _append_all(self, results: Backlog[Outcome]) -> tuple[list[tuple[int, Outcome]], float]:
        """In the thread: append what there is; returns it, and the seconds.

        What comes meanwhile is left to the next write: single rows would cost more than their writing. When
        that may begin by now, this thread begins it: `put` saw a write in progress and left the row to its
        end, and the event loop may be busy. This ends, since `results` is bounded until rows are passed on.
        """
        loop, seconds = self._all_written.get_loop(), 0.0
        written: list[tuple[int, Outcome]] = []
        while True:
            began, left = time.perf_counter(), len(results)
            while batch := results.get_nowait(min(left, _MAX_BATCH)):
                left -= len(batch)
                written += self._log.append(batch)
            seconds += time.perf_counter() - began
            self._is_writing = False  # from here on `put` begins the next write
            if not len(results) or loop.time() < self._may_write_at:
                return written, seconds
            self._may_write_at, self._is_writing = loop.time() + _GATHER_S, True

    def _note_written(
        self, results: Backlog[Outcome], writing: asyncio.Future[tuple[list[tuple[int, Outcome]], float]]
    ) -> None:
        self._writes -= 1
        error = writing.exception()  # looked at in any case: asyncio reports those that nobody has seen
        if self._all_written.done():
            return  # cancelled, or an earlier write has failed
        if error:
            self._all_written.set_exception(error)
            return
        written, seconds = writing.result()
        self._counters.disk_s += seconds
        self._rows += len(written)
        self._written += written
        self._sync_soon.set()
        if self._rows - self._syncing >= self._sink.sync_rows or self._log.has_full_shards:
            self._sync_now.set()
        self._begin_write(results)

    async def _sync(self) -> None:
        """Sync `sync_interval_s` after the first unsynced row, or as soon as `sync_rows` are unsynced.

        A shard that is full is sealed at once.
        """
        while not self._ended or self._synced < self._rows:
            await self._sync_soon.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._sink.sync_interval_s):
                    await self._sync_now.wait()
            if not self._ended:
                self._sync_soon.clear()
                self._sync_now.clear()
            self._syncing = self._rows
            began = time.perf_counter()
            await asyncio.get_running_loop().run_in_executor(self._disk, self._log.sync)
            self._counters.disk_s += time.perf_counter() - began
            self._synced = self._syncing
            self._have_synced.set()

    async def _pass_on(self, results: Backlog[Outcome], durable: BoundedQueue[DurableContext]) -> None:
        passed_on = 0
        while not self._ended or passed_on < self._rows:
            if passed_on == self._synced:
                self._have_synced.clear()
                await self._have_synced.wait()
                continue
            seq, outcome = self._written.popleft()
            passed_on += 1
            count_outcome(self._counters, outcome)
            if isinstance(outcome, Context):
                self._on_durable(seq, outcome)
                await durable.put((seq, outcome))
            results.done()

    def _end(self) -> None:
        self._ended = True
        self._sync_soon.set()
        self._sync_now.set()
        self._have_synced.set()


def count_outcome(counters: Counters, outcome: Outcome) -> None:
    """Add an outcome to the counters."""
    counters.wasted_tokens += outcome.wasted_tokens
    counters.retries += sum(attempt.error is not None for attempt in outcome.attempts)
    if isinstance(outcome, Reject):
        counters.count_reject(outcome.reason, outcome.origin, outcome.detail)
        return
    counters.count_context(
        prompt_tokens=outcome.prompt_tokens,
        cached_tokens=outcome.cached_tokens,
        cached_host_tokens=sum(step.get("cached_host_tokens", 0) for step in outcome.steps),
        cached_storage_tokens=sum(step.get("cached_storage_tokens", 0) for step in outcome.steps),
        completion_tokens=outcome.completion_tokens,
        thinking_tokens=outcome.thinking_tokens,
        words=outcome.checks.get("words", 0),
        flags=outcome.checks.get("flags", ()),
    )


def _nothing() -> None:
    """Do nothing."""
