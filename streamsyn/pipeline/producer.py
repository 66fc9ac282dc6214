"""The producer: reads seeds, skips what already has an outcome, and puts the rest on the work queue.

The order on the queue is that of `work_order`: prefix groups are kept together; with `seeds.task_losses`,
hard tasks come first.
"""

import asyncio
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from streamsyn.config.loading import Config
from streamsyn.pipeline.reopened import Reopened, Sought
from streamsyn.pipeline.work_order import GroupOrder, TaskLosses, TaskOrder
from streamsyn.queues import BoundedQueue
from streamsyn.records import BadSeed, Draft, Entry, Seed, Work
from streamsyn.seeds.reader import SeedReader, is_spooled
from streamsyn.sink.completed_keys import Claim, Claims
from streamsyn.telemetry import Counters

_Batch: TypeAlias = list[tuple[str, Work]]
_Reading: TypeAlias = asyncio.Future[_Batch | None]

_REFRESH_S = 1.0
"""Shortest time between two looks at the trainer's losses."""


class Producer:
    """Feeds the work queue. Reading, parsing and looking up keys happen in one thread of its own.

    Args:
        reader: Reads the sources of seeds.
        claims: Knows which drafts are finished, and which seeds this run has read before.
        config: Sets the drafts per seed, the limit of seeds, and the order.
        counters: Counts what is read.
        group_of: The recipe's `group`: returns the prefix group of a seed.
        reopened: The rejects that a retry asks again, if one is open.
        look: Called with each seed that is put on the queue.
    """

    def __init__(
        self,
        reader: SeedReader,
        claims: Claims,
        config: Config,
        counters: Counters,
        group_of: Callable[[Seed], str] = lambda _: "",
        reopened: Reopened | None = None,
        look: Callable[[Seed], None] = lambda _: None,
    ) -> None:
        self._reader = reader
        self._claims = claims
        self._drafts = range(config.recipe.contexts_per_seed)
        self._limit = config.seeds.limit
        self._counters = counters
        self._group_of = group_of
        self._reopened = reopened
        self._look = look
        self._has_groups = config.seeds.group_window > 0
        self._order: GroupOrder[Work] | TaskOrder[Work] = GroupOrder(config.seeds.group_window)
        self._losses: TaskLosses | None = None
        self._refreshed = -math.inf
        if config.seeds.task_losses is not None:
            self._losses = TaskLosses(config.seeds.task_losses)
            window, exponent = config.seeds.task_window, config.seeds.task_exponent
            self._order = TaskOrder(_task, self._losses, window, exponent, config.run.seed)
        self._taken = 0

    async def run(self, work: BoundedQueue[Work]) -> None:
        """Put everything that has no outcome yet on `work`.

        Raises:
            ConfigError: A source cannot be read to its end; what was read is on the queue.
            SinkError: Seeds from a pipe cannot be spooled.
        """
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="seeds")
        batches = self._batches()
        reading: _Reading | None = None
        at_end = False
        try:
            while not at_end or self._order:
                if reading is None and not at_end and self._order.has_room:
                    reading = loop.run_in_executor(thread, next, batches, None)
                # Items that were read never wait for reading, and go on the queue before an error is raised.
                if reading is not None and (not self._order or _has_batch(reading)):
                    batch, reading = await reading, None
                    self._order.add(batch or ())
                    at_end = batch is None
                if self._order:
                    await self._refresh_losses()
                    await work.put(self._order.take())
            self._counters.reading_done = True
        finally:
            if reading is not None:
                reading.cancel()
            self._reader.stop()  # ends a read that waits for stdin or the inbox
            thread.submit(batches.close)
            thread.shutdown(wait=False)

    async def _refresh_losses(self) -> None:
        """Read the trainer's losses again, at most every _REFRESH_S."""
        now = asyncio.get_running_loop().time()
        if self._losses is not None and now - self._refreshed >= _REFRESH_S:
            self._refreshed = now
            await asyncio.to_thread(self._losses.refresh)

    def _batches(self) -> Generator[_Batch]:
        if self._reopened is None:
            yield from self._unread(None)
            return
        for drafts in self._reopened.drafts():
            self._counters.drafts_read += len(drafts)
            yield [(self._group(draft), draft) for draft in drafts]
        with self._reopened.in_sources() as sought:
            yield from self._unread(sought)

    def _unread(self, sought: Sought | None) -> Iterator[_Batch]:
        """What the sources hold and has no outcome yet, and what is `sought` there to be asked again."""
        for entries in self._reader.batches(self._is_known, self._is_taken):
            items = [(entry, self._work_of(entry)) for entry in entries]
            finished = self._claims.finished([key for _, parts in items for key, _ in parts])
            if sought is not None:
                items = [(entry, _sought(sought, entry, parts, finished)) for entry, parts in items]
            with self._claims.batch():
                new = [work for entry, parts in items for work in self._unfinished(entry, parts, finished)]
            for item in new:
                if isinstance(item, Draft):
                    self._look(item.seed)
            grouped = [(self._group(item), item) for item in new]
            yield grouped  # outside the transaction: the next batch may be asked for much later
            if self._is_enough:
                return

    def _group(self, item: Work) -> str:
        return "" if isinstance(item, BadSeed) or not self._has_groups else self._group_of(item.seed)

    @property
    def _is_enough(self) -> bool:
        return self._limit is not None and self._taken >= self._limit

    def _work_of(self, entry: Entry) -> list[tuple[bytes, Work]]:
        """The drafts of a seed, or the one bad line, each with its key."""
        if isinstance(entry, BadSeed):
            return [(entry.key, entry)]
        drafts = [Draft(entry, number) for number in self._drafts]
        return [(draft.key, draft) for draft in drafts]

    def _unfinished(
        self, entry: Entry, parts: Sequence[tuple[bytes, Work]], finished: set[bytes]
    ) -> list[Work]:
        """The parts of an entry without an outcome; none if this run has read the entry before."""
        if self._is_enough:
            return []
        self._counters.seeds_read += 1
        left = [work for key, work in parts if key not in finished]
        # Finished entries need not be claimed, which makes a resume twice as fast; but a limit must count
        # each seed once.
        must_claim = bool(left) or self._limit is not None
        if must_claim and self._claims.claim(parts[0][0], spooled=is_spooled(entry)) is Claim.REPEATED:
            self._counters.repeated += 1
            return []
        self._taken += isinstance(entry, Seed)
        self._counters.drafts_read += len(parts)
        self._counters.finished_before += len(parts) - len(left)
        return left

    def _is_taken(self, seed: Seed) -> bool:
        """Whether this run has read a seed with the same id."""
        return self._claims.is_claimed(Draft(seed).key)

    def _is_known(self, entry: Entry) -> bool:
        """Whether the spool need not hold an entry: it holds it already, or all its drafts are finished."""
        return self._claims.is_known([key for key, _ in self._work_of(entry)])


def _sought(
    sought: Sought, entry: Entry, parts: list[tuple[bytes, Work]], finished: set[bytes]
) -> list[tuple[bytes, Work]]:
    """The parts of an entry, with those that are asked again no longer among the finished ones."""
    again = sought.found(entry, parts, finished)
    finished.difference_update(again)
    return [(key, again.get(key, work)) for key, work in parts]


def _task(item: Work) -> str:
    return "" if isinstance(item, BadSeed) else item.seed.task


def _has_batch(reading: _Reading) -> bool:
    """Whether reading is done, without an error."""
    return reading.done() and reading.exception() is None
