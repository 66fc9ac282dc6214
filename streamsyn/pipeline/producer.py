"""Reads seeds and puts what has no outcome yet on the work queue, groups together and hard tasks first."""

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from streamsyn.config.loading import Config
from streamsyn.pipeline.work_order import ByTask, Regroup, TaskLosses
from streamsyn.queues import BoundedQueue
from streamsyn.records import BadSeed, Draft, Entry, Seed, Work, draft_key
from streamsyn.seeds.reader import SeedReader
from streamsyn.sink.completed_keys import Claim, Claims
from streamsyn.telemetry import Counters

_Batch: TypeAlias = list[tuple[str, Work]]
_Reading: TypeAlias = asyncio.Future[_Batch | None]

_LOOK_S = 1.0
"""A trainer's losses are looked for at most so often."""


class Producer:
    """Feeds the work queue. Reading, parsing and looking up happen in one thread of its own.

    Args:
        reader: Where entries come from.
        claims: What has been read and what is finished.
        config: Says how many drafts a seed gets, and how many seeds are taken.
        counters: Told what is read.
        group_of: The recipe's `group`; without it seeds stay in their order.
    """

    def __init__(
        self,
        reader: SeedReader,
        claims: Claims,
        config: Config,
        counters: Counters,
        group_of: Callable[[Seed], str] = lambda _: "",
    ) -> None:
        self._reader = reader
        self._claims = claims
        self._drafts = range(config.recipe.contexts_per_seed)
        self._limit = config.seeds.limit
        self._counters = counters
        self._group_of = group_of
        self._has_groups = config.seeds.group_window > 0
        self._held: Regroup[Work] | ByTask[Work] = Regroup(config.seeds.group_window)
        self._losses: TaskLosses | None = None
        self._looked = -math.inf
        if config.seeds.task_losses is not None:
            self._losses = TaskLosses(config.seeds.task_losses)
            window, exponent = config.seeds.task_window, config.seeds.task_exponent
            self._held = ByTask(_task, self._losses, window, exponent, config.run.seed)
        self._taken = 0

    async def run(self, work: BoundedQueue[Work]) -> None:
        """Put everything there is to do on `work`.

        Raises:
            ConfigError: A source cannot be read any further; what was read is on the queue.
            SinkError: What comes from a pipe cannot be spooled.
        """
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="seeds")
        batches = self._batches()
        reading: _Reading | None = None
        at_end = False
        try:
            while not at_end or self._held:
                if reading is None and not at_end and self._held.has_room:
                    reading = loop.run_in_executor(thread, next, batches, None)
                # What is held never waits for what is still to be read, and goes before an error.
                if reading is not None and (not self._held or _is_good(reading)):
                    batch, reading = await reading, None
                    self._held.add(batch or ())
                    at_end = batch is None
                if self._held:
                    await self._look()
                    await work.put(self._held.take())
            self._counters.reading_done = True
        finally:
            if reading is not None:
                reading.cancel()
            self._reader.stop()  # ends a read that waits for stdin
            thread.shutdown(wait=False)

    async def _look(self) -> None:
        """See, now and then, whether a trainer has found out which tasks are hard."""
        now = asyncio.get_running_loop().time()
        if self._losses is not None and now - self._looked >= _LOOK_S:
            self._looked = now
            await asyncio.to_thread(self._losses.look)

    def _batches(self) -> Iterator[_Batch]:
        for entries in self._reader.batches(self._is_known):
            items = [(entry, self._work_of(entry)) for entry in entries]
            finished = self._claims.finished([key for _, parts in items for key, _ in parts])
            with self._claims.batch():
                left = [work for entry, parts in items for work in self._left(entry, parts, finished)]
            grouped = [(self._group(item), item) for item in left]
            yield grouped  # outside the transaction: it may be long until the next batch is wanted
            if self._is_enough:
                return

    def _group(self, item: Work) -> str:
        return "" if isinstance(item, BadSeed) or not self._has_groups else self._group_of(item.seed)

    @property
    def _is_enough(self) -> bool:
        return self._limit is not None and self._taken >= self._limit

    def _work_of(self, entry: Entry) -> list[tuple[bytes, Work]]:
        """What an entry asks for, each with its key."""
        if isinstance(entry, BadSeed):
            return [(entry.key, entry)]
        drafts = [Draft(entry, number) for number in self._drafts]
        return [(draft.key, draft) for draft in drafts]

    def _left(self, entry: Entry, parts: Sequence[tuple[bytes, Work]], finished: set[bytes]) -> list[Work]:
        """What of it is still to be done, unless the entry has been read before in this run."""
        if self._is_enough:
            return []
        self._counters.seeds_read += 1
        left = [work for key, work in parts if key not in finished]
        # What is finished need not be noted as read, which makes a resume twice as quick; but a limit
        # counts each seed once.
        is_to_note = bool(left) or self._limit is not None
        if is_to_note and self._claims.claim(parts[0][0]) is Claim.REPEATED:
            self._counters.repeated += 1
            return []
        self._taken += isinstance(entry, Seed)
        self._counters.drafts_read += len(parts)
        self._counters.finished_before += len(parts) - len(left)
        return left

    def _is_known(self, entry: Entry) -> bool:
        key = entry.key if isinstance(entry, BadSeed) else draft_key(entry.id, 0)
        return self._claims.is_known(key)


def _task(item: Work) -> str:
    return "" if isinstance(item, BadSeed) else item.seed.task


def _is_good(reading: _Reading) -> bool:
    """Whether there is a batch, and no error."""
    return reading.done() and reading.exception() is None
