"""The parts of SGLang's scheduler: waiting queue, KV pool, running batch, and who is prefilled next."""

import heapq
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

from streamsyn.simulator.costs import CostModel
from streamsyn.simulator.engine import Work
from streamsyn.simulator.radix_cache import BLOCK_TOKENS, RadixCache, extend_keys

INITIAL: Final = 0.7  # SGLANG_INIT_NEW_TOKEN_RATIO
LEAST: Final = INITIAL * 0.14  # SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR
DECAY: Final = (INITIAL - LEAST) / 600  # SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS
AHEAD_STEPS: Final = 20  # SGLANG_RETRACT_DECODE_STEPS
WINDOW_S: Final = 15.0  # SGLANG_CACHE_HIT_RATE_WINDOW_SECONDS
RESERVE_LIMIT: Final = 4096
"""No more new tokens than this are reserved for a request (SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION)."""


class NewTokenRatio:
    """The share of the tokens that running requests may still write for which room is kept.

    As NewTokenRatioTracker (srt/managers/scheduler_components): it sinks with every decode step, and rises to
    what proved necessary when requests had to be retracted.
    """

    def __init__(self) -> None:
        self._ratio = INITIAL
        self._since = 0

    def at(self, steps: int) -> float:
        """The share after so many decode steps of the server."""
        return max(self._ratio - DECAY * (steps - self._since), LEAST)

    def retracted(self, steps: int, left: Collection[Work]) -> None:
        """Some were retracted and these are left."""
        written = sum(work.written for work in left) + AHEAD_STEPS * len(left)
        self._ratio = min(1.0, written / (sum(work.max_new_tokens or 0 for work in left) + 1))
        self._since = steps

    def reset(self, steps: int) -> None:
        """The server is idle."""
        self._ratio, self._since = INITIAL, steps


class HitRate:
    """Share of prompt tokens that came from the cache: in the last admission, and lately.

    Requests that come back after a retraction do not count.
    """

    def __init__(self) -> None:
        self.last = 0.0
        self._samples: deque[tuple[float, int, int]] = deque()
        self._hits = 0
        self._tokens = 0

    def add(self, now: float, hits: int, computed: int) -> None:
        """A request was admitted at nominal second `now`."""
        tokens = hits + computed
        self.last = hits / tokens if tokens else 0.0
        self._samples.append((now, hits, tokens))
        self._hits += hits
        self._tokens += tokens
        self._expire(now)

    def recent(self, now: float) -> float:
        """The share in the last 15 seconds."""
        self._expire(now)
        return self._hits / self._tokens if self._tokens else 0.0

    def _expire(self, now: float) -> None:
        while self._samples and self._samples[0][0] <= now - WINDOW_S:
            _, hits, tokens = self._samples.popleft()
            self._hits -= hits
            self._tokens -= tokens


class RunningBatch:
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


def reserved_tokens(work: Work, written: int) -> int:
    """New tokens to reserve for a request that has written so many."""
    return min(max(0, (work.max_new_tokens or 0) - written), RESERVE_LIMIT)


class KVPool:
    """The tokens of a server's KV memory: the prefix cache, and what running requests hold beside it.

    At all times: cache + private <= size, and what running requests took from the cache is locked there.
    """

    def __init__(self, size: int, *, caching: bool) -> None:
        self.size: Final = size
        self.caching: Final = caching
        self.cache = RadixCache()
        self.private = 0

    @property
    def free(self) -> int:
        """Tokens that nothing lies in."""
        return self.size - self.cache.blocks * BLOCK_TOKENS - self.private

    @property
    def available(self) -> int:
        """Tokens that are free or can be evicted."""
        return self.size - self.cache.locked * BLOCK_TOKENS - self.private

    @property
    def used(self) -> int:
        """Tokens that running requests hold: the real server does not count what can be evicted."""
        return self.size - self.available

    def lock(self, work: Work) -> int:
        """Locks the longest prefix of `work` that is held, and says how many tokens it spares."""
        blocks = 0
        if self.caching:
            node, blocks = self.cache.match(work.keys, max(0, work.reusable) // BLOCK_TOKENS)
            self.cache.lock(node)
            work.node = node
        work.locked = blocks * BLOCK_TOKENS
        return work.locked

    def unlock(self, work: Work) -> None:
        """Takes back `lock`."""
        if work.node is not None:
            self.cache.unlock(work.node)
            work.node = None
        work.locked = 0

    def take(self, tokens: int) -> None:
        """Makes `tokens` private; evicts what must go for them. There must be as many available."""
        self.private += tokens
        if self.free < 0:
            self.cache.evict(-(self.free // BLOCK_TOKENS))

    def share(self, work: Work) -> None:
        """Puts the prompt of `work`, now computed, into the cache; it stays locked."""
        if not self.caching:
            return
        held = work.locked + work.private
        keys = work.keys
        self.private -= work.private
        node, _ = self.cache.insert(keys)
        self.cache.lock(node)
        self.unlock(work)
        work.node = node
        work.locked = len(keys) * BLOCK_TOKENS
        work.private = held - work.locked
        self.private += work.private

    def release(self, work: Work, private: int, *, keep: bool) -> None:
        """Frees what `work` holds, `private` tokens beside its prefix; `keep`: the cache takes its answer."""
        held = work.locked + private
        self.private -= private
        if keep and self.caching and isinstance(work.prompt, str) and work.output:
            self.cache.insert(extend_keys(work.keys, work.prompt, work.output)[: held // BLOCK_TOKENS])
        self.unlock(work)
        work.private = 0


SORT_LIMIT: Final = 128
"""With more waiting, lpm leaves the queue as it is (WAITING_QUEUE_PREFIX_MATCH_MAX)."""
COLD_TOKENS: Final = 32
"""A request that finds no more than this in the cache waits behind one with the same beginning
(IN_BATCH_PREFIX_CACHING_CHECK_THRESHOLD and its twin)."""


class WaitingQueue:
    """Requests that wait for a prefill: in order of arrival, or by what the cache holds of them.

    As SchedulePolicy.calc_priority (srt/managers/schedule_policy.py): with lpm and at most 128 waiting, the
    longest held prefix goes first, and of several that begin alike with nothing held all but one go last.
    """

    def __init__(self, policy: str) -> None:
        self.tokens = 0
        """What has to lie in the pool before all of them have their first token."""
        self._policy = policy
        self._works: OrderedDict[Work, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._works)

    def __iter__(self) -> Iterator[Work]:
        return iter(self._works)

    def __contains__(self, work: Work) -> bool:
        return work in self._works

    @property
    def sorts(self) -> bool:
        """Whether prefixes decide, as things stand."""
        return self._policy == "lpm" and len(self._works) <= SORT_LIMIT

    @property
    def first(self) -> Work:
        """Who is next."""
        return next(iter(self._works))

    def add(self, work: Work) -> None:
        """At the end; one that was retracted too."""
        self._works[work] = None
        self.tokens += work.tokens + work.written

    def remove(self, work: Work) -> None:
        """Out of the queue, wherever it stands."""
        del self._works[work]
        self.tokens -= work.tokens + work.written

    def sort(self, cache: RadixCache) -> None:
        """Puts the queue in order, where prefixes decide."""
        if not self.sorts:
            return
        leaders: set[int] = set()
        ranks: dict[Work, float] = {}
        for work in self._works:
            held = cache.measure(work.keys) * BLOCK_TOKENS
            ranks[work] = -held
            if held <= COLD_TOKENS and work.keys:
                if work.keys[0] in leaders:
                    ranks[work] = float("inf")
                leaders.add(work.keys[0])
        for work in sorted(self._works, key=ranks.__getitem__):
            self._works.move_to_end(work)


@dataclass(slots=True)
class Part:
    """What one prefill batch computes of a request: `new` tokens that follow `before` others."""

    work: Work
    before: int
    new: int

    @property
    def left(self) -> int:
        """Tokens that are not computed when this part is."""
        return self.work.tokens + self.work.written - self.before - self.new


def room_alone(model: CostModel, work: Work) -> int:
    """New tokens for which the pool has room when nobody else is in it."""
    return model.pool_tokens - work.tokens - 2


class Admission:
    """Who of the waiting requests is prefilled next, and how much of it at once.

    As PrefillAdder (srt/managers/schedule_policy.py) without priorities: a request needs a seat in the batch
    and room for what it has to compute and all that it may write, beside a share of what the running ones may
    still write. The first that does not fit closes the listener for all until somebody leaves the batch.
    """

    def __init__(self, model: CostModel, pool: KVPool, waiting: WaitingQueue, decoding: RunningBatch) -> None:
        self.parts: list[Part] = []
        """The prefill batch under way."""
        self.full = False
        self.prefilled = 0
        """Tokens computed since the start."""
        self.ratio: Final = NewTokenRatio()
        self.hits: Final = HitRate()
        self._model = model
        self._pool = pool
        self._waiting = waiting
        self._decoding = decoding
        self._chunked: Part | None = None

    def begin(self, now: float, stalled: int) -> float | None:
        """Puts the next prefill batch together: how many seconds it takes, None if there is none."""
        budget = self._model.prefill_tokens
        if self._chunked is not None:
            cut, self._chunked = self._chunked, None
            budget -= self._add(cut.work, cut.before + cut.new, budget)
        if self._waiting and not self.full:
            self._waiting.sort(self._pool.cache)
            self._fill(budget, now, stalled)
        if not self.parts:
            return None
        return self._model.prefill((part.before, part.new) for part in self.parts)

    def end(self, *, starting: bool) -> list[Work]:
        """The prefill batch is computed; requests that are through. `starting`: nobody was decoding."""
        parts, self.parts = self.parts, []
        if starting:  # it becomes the running batch, and that one is not full yet
            self.full = False
        through = []
        for part in parts:
            if part.left and not part.work.aborted:
                self._chunked = part
            else:
                through.append(part.work)
        return through

    def _fill(self, budget: int, now: float, stalled: int) -> None:
        seats = self._model.max_running_requests - len(self._decoding) - stalled - len(self.parts)
        promised = self.ratio.at(self._decoding.steps) * self._decoding.reserve
        while self._waiting and budget > 0:
            work = self._waiting.first
            self._clip(work)
            new = work.tokens + work.written - self._pool.lock(work)
            wanted = reserved_tokens(work, work.written) + 1
            if seats <= 0 or promised + new + wanted >= self._pool.available:
                self._pool.unlock(work)
                self.full = bool(self.parts or self._decoding or stalled)
                return
            seats -= 1
            promised += wanted
            self._waiting.remove(work)
            work.running = True
            if not work.retractions:
                work.cached_tokens = work.locked
                self.hits.add(now, work.locked, new)
            self.prefilled += new
            self._pool.take(new)
            work.private = new
            budget -= self._add(work, work.locked, budget)

    def _add(self, work: Work, before: int, budget: int) -> int:
        """Adds as much of a request as fits to the batch; says how much that was."""
        new = min(budget, work.tokens + work.written - before)
        self.parts.append(Part(work, before, new))
        return new

    def _clip(self, work: Work) -> None:
        """No request may write more than fits when it is alone, as in the real server."""
        room = room_alone(self._model, work)
        work.target = min(work.target, room)
        asked = room if work.max_new_tokens is None else min(work.max_new_tokens, room)
        work.max_new_tokens = max(work.target, asked)
