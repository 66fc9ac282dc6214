"""The engine of `--cost-model plain`: fixed slots, and each request on its own clock."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from streamsyn.simulator.engine import DuplicateRid, Load, QueueFull, ServerLost, Work, settle
from streamsyn.simulator.radix_cache import BLOCK_TOKENS, extend_keys
from streamsyn.simulator.texts import CHARACTERS_PER_TOKEN


class PlainEngine:
    """Slots, a FIFO queue and a prefix cache; requests do not slow each other down. See `Engine`.

    Args:
        slots: Maximum running requests.
        queue_limit: Maximum waiting requests; None for no limit.
        cache_tokens: Size of the prefix cache.
        first_token_s: Returns the seconds to the first token of the next request.
        token_s: Seconds per token after that.
    """

    def __init__(
        self,
        slots: int,
        queue_limit: int | None,
        cache_tokens: int,
        first_token_s: Callable[[], float] = lambda: 0.0,
        token_s: float = 0.0,
    ) -> None:
        self.slots = slots
        self.cache = PrefixCache(cache_tokens)
        self.speed = 1.0
        self.running = 0
        self.running_tokens = 0
        self.waiting_tokens = 0
        self._pool = max(1, cache_tokens)
        self._first_token_s = first_token_s
        self._token_s = token_s
        self._queue_limit = queue_limit
        self._waiting: OrderedDict[Work, None] = OrderedDict()
        self._live: dict[str, Work] = {}

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    def enter(self, work: Work) -> None:
        """See Engine. Takes a free slot, else a place in the queue."""
        if work.rid in self._live:
            raise DuplicateRid(work.rid)
        if self.running < self.slots:
            self._run(work)
        elif self._queue_limit is not None and len(self._waiting) >= self._queue_limit:
            raise QueueFull
        else:
            self._waiting[work] = None
            self.waiting_tokens += work.tokens
            work.wake = asyncio.get_running_loop().create_future()
        self._live[work.rid] = work

    def leave(self, work: Work) -> None:
        """See Engine. The first request in the queue gets the slot."""
        del self._live[work.rid]
        self._unqueue(work)
        if not work.running:
            return
        self.running -= 1
        self.running_tokens -= work.tokens
        if self._waiting:
            following = next(iter(self._waiting))
            self._unqueue(following)
            self._run(following)
            settle(following)

    def abort(self, rid: str, *, exact: bool) -> int:
        if not rid or (exact and rid not in self._live):
            return 0
        return self._abort([work for work in self._live.values() if work.rid.startswith(rid)])

    def abort_all(self) -> int:
        return self._abort(list(self._live.values()))

    def lose_all(self) -> None:
        for work in self._live.values():
            work.lost = True
        self._abort(list(self._live.values()))
        self.cache.clear()

    async def begin(self, work: Work) -> None:
        if not work.running and not work.aborted and work.wake is not None:
            await work.wake
        if work.running and not work.lost:
            work.cached_tokens = self.cache.match(work.keys, work.reusable)
            if work.stalls:
                await self._spend(work, None)
            await self._spend(work, self._first_token_s())
            if not work.aborted:
                self.cache.insert(work.keys)
        if work.lost:
            raise ServerLost

    async def write(self, work: Work, tokens: int) -> int:
        began = asyncio.get_running_loop().time()
        total_s = (tokens - work.written) * self._token_s / self.speed
        await self._spend(work, total_s)
        if work.lost:
            raise ServerLost
        if work.aborted and total_s:
            share = min(1.0, (asyncio.get_running_loop().time() - began) / total_s)
            tokens = work.written + int(share * (tokens - work.written))
        work.written = tokens
        if work.written and (work.aborted or work.written >= work.target) and isinstance(work.prompt, str):
            output = work.output[: work.written * CHARACTERS_PER_TOKEN]
            self.cache.insert(extend_keys(work.keys, work.prompt, output))
        return work.written

    def load(self) -> Load:
        return Load(
            running=self.running,
            waiting=len(self._waiting),
            waiting_tokens=self.waiting_tokens,
            waiting_uncached_tokens=None,
            used_tokens=self.running_tokens,
            pool_tokens=self._pool,
            max_running_requests=self.slots,
        )

    async def _spend(self, work: Work, seconds: float | None) -> None:
        """Sleep, for ever if `seconds` is None; an abort wakes it. Zero seconds do not yield to the loop."""
        if work.aborted or seconds == 0:
            return
        loop = asyncio.get_running_loop()
        work.wake = loop.create_future()
        timer = None if seconds is None else loop.call_later(seconds, settle, work)
        try:
            await work.wake
        finally:
            if timer is not None:
                timer.cancel()

    def _run(self, work: Work) -> None:
        work.running = True
        self.running += 1
        self.running_tokens += work.tokens

    def _unqueue(self, work: Work) -> None:
        if work in self._waiting:
            del self._waiting[work]
            self.waiting_tokens -= work.tokens

    def _abort(self, works: list[Work]) -> int:
        for work in works:
            work.aborted = True
            self._unqueue(work)
            settle(work)
        return len(works)


class PrefixCache:
    """Cached prefixes, as a bounded set of chained block keys with LRU eviction."""

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity = capacity_tokens // BLOCK_TOKENS
        self._blocks: OrderedDict[int, None] = OrderedDict()

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return len(self._blocks) * BLOCK_TOKENS

    def match(self, keys: list[int], limit_tokens: int) -> int:
        """Return the tokens of the longest cached prefix, at most `limit_tokens`; mark it as used."""
        held = 0
        for key in keys[: max(0, limit_tokens) // BLOCK_TOKENS]:
            if key not in self._blocks:
                break
            held += 1
        self._touch(keys[:held])
        return held * BLOCK_TOKENS

    def insert(self, keys: list[int]) -> None:
        """Add the prefix with these block keys; evict the least recently used blocks beyond the capacity."""
        for key in keys:
            self._blocks[key] = None
        self._touch(keys)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        """Empty the cache."""
        self._blocks.clear()

    def _touch(self, keys: list[int]) -> None:
        # A prefix stays newer than its continuations: leaves are evicted first, as in a radix tree.
        for key in reversed(keys):
            self._blocks.move_to_end(key)
