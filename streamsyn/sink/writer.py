"""The sink as a stage: outcomes in, durable contexts out.

What arrives is written at once, so that a kill loses nothing that has been written; the disk is
synced every `sink.sync_interval_s`, and only then does a context go on to assembly.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeAlias, TypeVar

from streamsyn.config import SinkSection
from streamsyn.queues import BoundedQueue
from streamsyn.records import Context, Outcome
from streamsyn.sink.runlog import RunLog
from streamsyn.telemetry import Counters

T = TypeVar("T")
DurableContext: TypeAlias = tuple[int, Context]

_MAX_BATCH = 256


class OutcomeWriter:
    """Takes outcomes from `results` until its end; hands contexts on once they are on disk.

    Raises (from `run`):
        SinkError: The log cannot be written.
    """

    def __init__(self, log: RunLog, sink: SinkSection, counters: Counters) -> None:
        self._log = log
        self._sink = sink
        self._counters = counters
        self._written: BoundedQueue[tuple[int, Outcome]] = BoundedQueue(sink.sync_rows)
        self._sync_now = asyncio.Event()
        self._disk = asyncio.Lock()  # the log is for one thread at a time

    async def run(self, results: BoundedQueue[Outcome], durable: BoundedQueue[DurableContext]) -> None:
        """Write until `results` ends, then sync what is left."""
        async with asyncio.TaskGroup() as group:
            writing = group.create_task(self._write(results), name="sink-write")
            writing.add_done_callback(lambda _: self._end())
            group.create_task(self._sync(durable), name="sink-sync")

    async def _write(self, results: BoundedQueue[Outcome]) -> None:
        async for outcome in results:
            batch = [outcome, *results.get_nowait(_MAX_BATCH - 1)]
            for written in await self._in_thread(partial(self._log.append, batch)):
                if len(self._written) == self._sink.sync_rows - 1:
                    self._sync_now.set()
                await self._written.put(written)

    async def _sync(self, durable: BoundedQueue[DurableContext]) -> None:
        async for first in self._written:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._sink.sync_interval_s):
                    await self._sync_now.wait()
            batch = [first, *self._written.get_nowait(self._sink.sync_rows)]
            if not self._written.closed:
                self._sync_now.clear()
            await self._in_thread(self._log.sync)
            for seq, outcome in batch:
                self._counters.count_outcome(outcome)
                if isinstance(outcome, Context):
                    await durable.put((seq, outcome))

    async def _in_thread(self, call: Callable[[], T]) -> T:
        async with self._disk:
            return await asyncio.to_thread(call)

    def _end(self) -> None:
        self._written.close()
        self._sync_now.set()
