"""Reads seeds and puts what has no outcome yet on the work queue."""

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from streamsyn.config import Config
from streamsyn.queues import BoundedQueue
from streamsyn.records import BadSeed, Draft, Entry, Seed, Work, draft_key
from streamsyn.seeds.reader import SeedReader
from streamsyn.sink.finished import Claim, Claims
from streamsyn.telemetry import Counters


class Producer:
    """Feeds the work queue. Reading, parsing and looking up happen in one thread of its own.

    Args:
        reader: Where entries come from.
        claims: What has been read and what is finished.
        config: Says how many drafts a seed gets, and how many seeds are taken.
        counters: Told what is read.
    """

    def __init__(self, reader: SeedReader, claims: Claims, config: Config, counters: Counters) -> None:
        self._reader = reader
        self._claims = claims
        self._drafts = range(config.recipe.contexts_per_seed)
        self._limit = config.seeds.limit
        self._counters = counters
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
        try:
            while (batch := await loop.run_in_executor(thread, next, batches, None)) is not None:
                for item in batch:
                    await work.put(item)
            self._counters.reading_done = True
        finally:
            self._reader.stop()  # ends a read that waits for stdin
            thread.shutdown(wait=False)

    def _batches(self) -> Iterator[list[Work]]:
        for entries in self._reader.batches(self._is_known):
            with self._claims.batch():
                yield [work for entry in entries for work in self._claim(entry)]
            if self._is_enough:
                return

    @property
    def _is_enough(self) -> bool:
        return self._limit is not None and self._taken >= self._limit

    def _claim(self, entry: Entry) -> Sequence[Work]:
        """What is to be done for an entry: nothing, if it is known."""
        if self._is_enough:
            return []
        self._counters.seeds_read += 1
        claim = self._claims.claim(_key(entry))
        if claim is Claim.REPEATED:
            self._counters.repeated += 1
            return []
        self._taken += isinstance(entry, Seed)
        if isinstance(entry, BadSeed):
            self._counters.drafts_read += 1
            work: list[Work] = [entry] if claim is Claim.NEW else []
            self._counters.finished_before += not work
            return work
        drafts = [Draft(entry, number) for number in self._drafts]
        self._counters.drafts_read += len(drafts)
        left = [
            draft
            for draft in drafts
            if not (claim is Claim.FINISHED if draft.number == 0 else self._claims.is_finished(draft.key))
        ]
        self._counters.finished_before += len(drafts) - len(left)
        return left

    def _is_known(self, entry: Entry) -> bool:
        return self._claims.is_known(_key(entry))


def _key(entry: Entry) -> bytes:
    return entry.key if isinstance(entry, BadSeed) else draft_key(entry.id, 0)
