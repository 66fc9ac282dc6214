import asyncio
import heapq
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from streamsyn.simulator.costs import CostModel
from streamsyn.simulator.engine import DuplicateRid, Load, QueueFull, ServerLost, Work, settle
from streamsyn.simulator.radix_cache import CHARACTERS_A_TOKEN, PrefixCache, extend

RESERVE_LIMIT: Final = 4096
"""No more new tokens than this are reserved for a request (SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION)."""


def remaining(work: Work, written: int) -> int:
    """New tokens to reserve for a request that has written so many."""
    return min(max(0, (work.max_new_tokens or 0) - written), RESERVE_LIMIT)


class Lockstep:
    """The running batch: at each step every request in it writes one token.

    Steps are not simulated one by one. A request's progress is the number of steps that passed since it
    joined, and a heap holds the step counts at which somebody wants to know.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.context = 0
        """Tokens in the contexts of all requests."""
        self.batch: dict[Work, None] = {}
        self._milestones: list[tuple[int, int, Work]] = []
        self._entries = 0
        # What is reserved for new tokens shrinks by one a step for all but those that hit the limit.
        self._shrinking = 0
        self._shrinking_reserve = 0

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def reserve(self) -> int:
        """New tokens that the requests may still ask for."""
        return self._shrinking_reserve + (len(self.batch) - self._shrinking) * RESERVE_LIMIT

    def join(self, work: Work) -> None:
        """Takes a request whose prefill is done and whose next token comes with the next step."""
        self.batch[work] = None
        work.joined, work.start = self.steps, work.written
        self.context += work.tokens + work.start - 1
        self._count(work, 1, work.written)
        self._mark(work)

    def part(self, work: Work) -> int:
        """Lets a request go, as of now; says how many tokens it holds beside its locked prefix."""
        del self.batch[work]
        passed = self.steps - work.joined
        work.written = work.start + passed
        self.context -= work.tokens + work.written - 1
        self._count(work, -1, work.written)
        work.entry = 0
        return work.private + passed

    def advance(self, steps: int) -> list[Work]:
        """Lets steps pass, no more than `next_milestone` of them; those that are where they wanted to be."""
        self.steps += steps
        self.context += steps * len(self.batch)
        self._shrinking_reserve -= steps * self._shrinking
        there = []
        heap = self._milestones
        while heap and heap[0][0] <= self.steps:
            _, entry, work = heapq.heappop(heap)
            if work.entry == entry:
                work.written = work.start + self.steps - work.joined
                there.append(work)
                if work.written < work.target:
                    self._mark(work)
        return there

    def next_milestone(self) -> int:
        """Steps until somebody is where it wanted to be."""
        heap = self._milestones
        while heap[0][2].entry != heap[0][1]:
            heapq.heappop(heap)
        return heap[0][0] - self.steps

    def seconds(self, model: CostModel, steps: int) -> float:
        """What so many steps take."""
        return model.decode(len(self.batch), self.context, steps)

    def steps_until(self, model: CostModel, seconds: float) -> int:
        """Steps until the first step that ends after `seconds`, or just then."""
        return model.steps_until(len(self.batch), self.context, seconds)

    def _count(self, work: Work, sign: int, written: int) -> None:
        wanted = (work.max_new_tokens or 0) - work.start
        if wanted <= RESERVE_LIMIT:
            self._shrinking += sign
            self._shrinking_reserve += sign * ((work.max_new_tokens or 0) - written)

    def _mark(self, work: Work) -> None:
        goal = work.target
        if work.piece:
            goal = min(goal, (work.written // work.piece + 1) * work.piece)
        self._entries += 1
        work.entry = self._entries
        heapq.heappush(self._milestones, (work.joined - work.start + goal, work.entry, work))


class PlainEngine:
    """Slots, a waiting queue in order of arrival, a prefix cache, and each request on its own clock.

    What a request takes does not depend on what else runs: `first_token_s` tells the time to its first token,
    and each token takes `token_s` more. `Engine` says what the methods do.
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
        """Requests that have no slot yet."""
        return len(self._waiting)

    def enter(self, work: Work) -> None:
        """Takes a slot if one is free, else a place in the queue; QueueFull means: no slot and no place."""
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
        """Gives back whatever `work` holds; the first in the queue gets its slot."""
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
            output = work.output[: work.written * CHARACTERS_A_TOKEN]
            self.cache.insert(extend(work.keys, work.prompt, output))
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
        """Lets time pass, for ever if None; an abort ends it at once. No time: no trip through the loop."""
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
