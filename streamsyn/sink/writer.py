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
from typing import TypeAlias, TypeVar

from streamsyn.config.sections import SinkSection
from streamsyn.queues import Backlog, BoundedQueue
from streamsyn.records import Context, Outcome
from streamsyn.sink.log import RunLog
from streamsyn.telemetry import Counters

T = TypeVar("T")
DurableContext: TypeAlias = tuple[int, Context]

_MAX_BATCH = 256
_GATHER_S = 0.005
"""Outcomes that arrive within this time are written together, with one call into a thread."""


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
        async for outcome in results:
            await asyncio.sleep(_GATHER_S)
            batch = [outcome, *results.get_nowait(_MAX_BATCH - 1)]
            written = await self._in_thread(self._writing, partial(self._log.append, batch))
            self._rows += len(written)
            self._written += written
            self._sync_soon.set()
            if self._rows - self._syncing >= self._sink.sync_rows or self._log.has_full_shards:
                self._sync_now.set()

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
            await self._in_thread(self._disk, self._log.sync)
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
            self._counters.count_outcome(outcome)
            if isinstance(outcome, Context):
                self._on_durable(seq, outcome)
                await durable.put((seq, outcome))
            results.done()

    def _end(self) -> None:
        self._ended = True
        self._sync_soon.set()
        self._sync_now.set()
        self._have_synced.set()

    async def _in_thread(self, thread: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        began = time.perf_counter()
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, call)
        finally:
            self._counters.disk_s += time.perf_counter() - began
