"""The parts of SGLang's scheduler: running batch, KV pool, waiting queue, admission to a prefill.

Compared line by line with SGLang 0.5.23 (srt/managers: `schedule_policy.py` PrefillAdder, `scheduler.py`
_get_new_batch_prefill_raw and update_running_batch, `schedule_batch.py` retract_decode; srt/mem_cache:
`prefill_budget.py`), with its defaults: pages of one token, `schedule_conservativeness` 1.0, no priorities,
no mixed chunks, `max_running_requests` seats. What is left out: the overlap of scheduling and computing, by
which a request leaves the batch one step after its last token.
"""

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
"""Maximum new tokens reserved for a request (SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION)."""
REPORT_STEPS: Final = 40
"""Decode steps between two reports of the load metrics (`--decode-log-interval`)."""


class NewTokenRatio:
    """The share of the running requests' possible new tokens that is reserved in the pool.

    As in NewTokenRatioTracker (srt/managers/scheduler_components), it falls with every decode step, and after
    a retraction it rises to what was needed.
    """

    def __init__(self) -> None:
        self._ratio = INITIAL
        self._since = 0

    def at(self, steps: int) -> float:
        """Return the share after `steps` decode steps of the server."""
        decayed = steps - self._since
        return max(self._ratio - DECAY * decayed, LEAST) if decayed > 0 else self._ratio

    def retracted(self, steps: int, left: Collection[Work]) -> None:
        """Record a retraction after which `left` are still running; the next step changes nothing."""
        written = sum(work.written for work in left) + AHEAD_STEPS * len(left)
        self._ratio = min(1.0, written / (sum(work.max_new_tokens or 0 for work in left) + 1))
        self._since = steps + 1

    def reset(self, steps: int) -> None:
        """Record that the server is idle."""
        self._ratio, self._since = INITIAL, steps


class Retractions:
    """The retracted requests that `/v1/loads` reports.

    As in the metrics reporter (srt/managers/scheduler_components/metrics_reporter.py): each prefill batch and
    each 40th decode step makes a report, of the last retraction since the report before. So it shows up late,
    and only until the next report. (Without `--enable-metrics` the real server reports none at all.)
    """

    def __init__(self) -> None:
        self._shown = 0
        self._new = 0
        self._steps = 0

    def at(self, steps: int) -> int:
        """Return the reported number after `steps` decode steps of the server."""
        reports = steps // REPORT_STEPS - self._steps // REPORT_STEPS
        return (self._shown, self._new, 0)[min(reports, 2)]

    def retracted(self, steps: int, number: int) -> None:
        """Record a retraction of `number` requests."""
        self._decoded(steps)
        self._new = number

    def prefilled(self, steps: int) -> None:
        """Record the end of a prefill batch."""
        self._decoded(steps)
        self._shown, self._new = self._new, 0

    def _decoded(self, steps: int) -> None:
        shown = self.at(steps)
        if steps // REPORT_STEPS > self._steps // REPORT_STEPS:
            self._new = 0
        self._shown, self._steps = shown, steps


class HitRate:
    """Share of prompt tokens that came from the cache: of the last admission, and of recent ones.

    Requests that are admitted again after a retraction do not count.
    """

    def __init__(self) -> None:
        self.last = 0.0
        self._samples: deque[tuple[float, int, int]] = deque()
        self._hits = 0
        self._tokens = 0

    def add(self, now: float, hits: int, computed: int) -> None:
        """Record an admission at nominal second `now`."""
        tokens = hits + computed
        self.last = hits / tokens if tokens else 0.0
        self._samples.append((now, hits, tokens))
        self._hits += hits
        self._tokens += tokens
        self._expire(now)

    def recent(self, now: float) -> float:
        """Return the share of the last 15 seconds."""
        self._expire(now)
        return self._hits / self._tokens if self._tokens else 0.0

    def _expire(self, now: float) -> None:
        while self._samples and self._samples[0][0] <= now - WINDOW_S:
            _, hits, tokens = self._samples.popleft()
            self._hits -= hits
            self._tokens -= tokens


class RunningBatch:
    """The running batch: at each step every request in it generates one token.

    Steps are not simulated one by one. A request's progress is the number of steps since it joined, and a
    heap holds the milestones: step counts at which a request ends or has to send an event.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.context = 0
        """Tokens in the contexts of all its requests."""
        self.batch: dict[Work, None] = {}
        self._milestones: list[tuple[int, int, Work]] = []
        self._entries = 0

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def reserve(self) -> int:
        """New tokens that all requests may still generate, at most `RESERVE_LIMIT` each."""
        return sum(
            min((work.max_new_tokens or 0) - work.start - self.steps + work.joined, RESERVE_LIMIT)
            for work in self.batch
        )

    def join(self, work: Work) -> None:
        """Add a request whose prefill is done; its next token comes with the next step."""
        self.batch[work] = None
        work.joined, work.start = self.steps, work.written
        self.context += work.tokens + work.start - 1
        self._mark(work)

    def remove(self, work: Work) -> int:
        """Remove a request. Return how many tokens it holds beside its locked prefix."""
        del self.batch[work]
        passed = self.steps - work.joined
        work.written = work.start + passed
        self.context -= work.tokens + work.written - 1
        work.entry = 0
        return work.private + passed

    def advance(self, steps: int) -> list[Work]:
        """Let at most `next_milestone` steps pass. Return the requests that reached their milestone."""
        self.steps += steps
        self.context += steps * len(self.batch)
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
        """Return the steps until the next milestone."""
        heap = self._milestones
        while heap[0][2].entry != heap[0][1]:
            heapq.heappop(heap)
        return heap[0][0] - self.steps

    def seconds(self, model: CostModel, steps: int) -> float:
        """Return the seconds that `steps` steps take."""
        return model.decode(len(self.batch), self.context, steps)

    def steps_until(self, model: CostModel, seconds: float) -> int:
        """Return the number of steps until the first one that ends at or after `seconds`."""
        return model.steps_until(len(self.batch), self.context, seconds)

    def _mark(self, work: Work) -> None:
        goal = work.target
        if work.piece:
            goal = min(goal, (work.written // work.piece + 1) * work.piece)
        self._entries += 1
        work.entry = self._entries
        heapq.heappush(self._milestones, (work.joined - work.start + goal, work.entry, work))


def reserved_tokens(work: Work, written: int) -> int:
    """Return the new tokens to reserve for a request that has generated `written`."""
    return min(max(0, (work.max_new_tokens or 0) - written), RESERVE_LIMIT)


class KVPool:
    """The KV memory in tokens: the prefix cache, and private tokens of running requests.

    Invariant: cache + private <= size. Cached prefixes of running requests are locked.
    """

    def __init__(self, size: int, *, caching: bool) -> None:
        self.size: Final = size
        self.caching: Final = caching
        self.cache = RadixCache()
        self.private = 0

    @property
    def free(self) -> int:
        """Unused tokens."""
        return self.size - self.cache.blocks * BLOCK_TOKENS - self.private

    @property
    def available(self) -> int:
        """Tokens that are unused or can be evicted."""
        return self.size - self.cache.locked * BLOCK_TOKENS - self.private

    @property
    def used(self) -> int:
        """Tokens that running requests hold; as in the real server, without what can be evicted."""
        return self.size - self.available

    def lock(self, work: Work) -> int:
        """Lock the longest cached prefix of `work`. Return its tokens."""
        blocks = 0
        if self.caching:
            node, blocks = self.cache.match(work.keys, max(0, work.reusable) // BLOCK_TOKENS)
            self.cache.lock(node)
            work.node = node
        work.locked = blocks * BLOCK_TOKENS
        return work.locked

    def unlock(self, work: Work) -> None:
        """Undo `lock`."""
        if work.node is not None:
            self.cache.unlock(work.node)
            work.node = None
        work.locked = 0

    def take(self, tokens: int) -> None:
        """Make `tokens` private, with eviction if needed. At least that many must be available."""
        self.private += tokens
        if self.free < 0:
            self.cache.evict(-(self.free // BLOCK_TOKENS))

    def share(self, work: Work) -> None:
        """Move the computed prompt of `work` into the cache, locked."""
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
        """Free what `work` holds: its prefix and `private` tokens; with `keep`, cache prompt and answer."""
        held = work.locked + private
        self.private -= private
        if keep and self.caching and isinstance(work.prompt, str) and work.output:
            self.cache.insert(extend_keys(work.keys, work.prompt, work.output)[: held // BLOCK_TOKENS])
        self.unlock(work)
        work.private = 0


SORT_LIMIT: Final = 128
"""With more waiting requests, lpm does not sort the queue (WAITING_QUEUE_PREFIX_MATCH_MAX)."""
COLD_TOKENS: Final = 32
"""A request with at most this many cached tokens waits behind one with the same first block
(IN_BATCH_PREFIX_CACHING_CHECK_THRESHOLD and IN_BATCH_PREFIX_CACHING_DEPRIORITIZE_THRESHOLD)."""


class WaitingQueue:
    """Requests that wait for a prefill: in order of arrival, or by their cached prefix.

    As in SchedulePolicy.calc_priority (srt/managers/schedule_policy.py): with lpm and at most 128 waiting,
    the longest cached prefix goes first; of several with the same uncached first block, all but one go last.
    """

    def __init__(self, policy: str) -> None:
        self.tokens = 0
        """Tokens of all waiting requests: prompts, and answers from before a retraction."""
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
        """Whether the queue is sorted by prefix at its current length."""
        return self._policy == "lpm" and len(self._works) <= SORT_LIMIT

    @property
    def first(self) -> Work:
        """The next request."""
        return next(iter(self._works))

    def add(self, work: Work) -> None:
        """Append a request, new or retracted."""
        self._works[work] = None
        self.tokens += work.tokens + work.written

    def remove(self, work: Work) -> None:
        """Remove a request from any position."""
        del self._works[work]
        self.tokens -= work.tokens + work.written

    def sort(self, cache: RadixCache) -> None:
        """Sort the queue by cached prefix, if the policy does."""
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
    """The part of a request in one prefill batch: `new` tokens after `before` others."""

    work: Work
    before: int
    new: int

    @property
    def left(self) -> int:
        """Tokens still to compute after this part."""
        return self.work.tokens + self.work.written - self.before - self.new


def room_alone(model: CostModel, work: Work) -> int:
    """Return the new tokens of a request that fit into an otherwise empty pool."""
    return model.pool_tokens - work.tokens - 2


class Admission:
    """Puts prefill batches together: which waiting requests are next, and how much of each.

    As in PrefillAdder (srt/managers/schedule_policy.py) without priorities: a request needs a seat in the
    batch, and room in the pool for the tokens to compute, all the new tokens that it may still generate, and
    a share of those of running requests. For one that was retracted, the rest of the same batch also sets
    aside the new tokens that it has generated already (`_update_prefill_budget`), as for the last chunk of a
    prompt (`add_chunked_req`). After the first that does not fit, none is admitted until a request leaves the
    batch.
    """

    def __init__(self, model: CostModel, pool: KVPool, waiting: WaitingQueue, decoding: RunningBatch) -> None:
        self.parts: list[Part] = []
        """The current prefill batch."""
        self.full = False
        self.prefilled = 0
        """Prompt tokens computed since the start."""
        self.ratio: Final = NewTokenRatio()
        self.hits: Final = HitRate()
        self._model = model
        self._pool = pool
        self._waiting = waiting
        self._decoding = decoding
        self._chunked: Part | None = None

    def begin(self, now: float, stalled: int) -> float | None:
        """Start the next prefill batch. Return its seconds, or None if there is none."""
        budget, promised = self._model.prefill_tokens, 0
        if self._chunked is not None:
            cut, self._chunked = self._chunked, None
            budget -= self._add(cut.work, cut.before + cut.new, budget)
            promised = reserved_tokens(cut.work, 0) + 1
        if self._waiting and not self.full:
            self._waiting.sort(self._pool.cache)
            self._fill(budget, promised, now, stalled)
        if not self.parts:
            return None
        return self._model.prefill((part.before, part.new) for part in self.parts)

    def end(self, *, starting: bool) -> list[Work]:
        """End the prefill batch. Return the requests whose prompt is complete.

        Args:
            starting: Whether no request was decoding.
        """
        parts, self.parts = self.parts, []
        if starting:  # it becomes the running batch, which is not full yet
            self.full = False
        complete = []
        for part in parts:
            if part.left and not part.work.aborted:
                self._chunked = part
            else:
                complete.append(part.work)
        return complete

    def _fill(self, budget: int, chunk: int, now: float, stalled: int) -> None:
        seats = self._model.max_running_requests - len(self._decoding) - stalled - len(self.parts)
        promised = chunk + self.ratio.at(self._decoding.steps) * self._decoding.reserve
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
            promised += reserved_tokens(work, 0) + 1
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
        """Add as much of a request to the batch as fits. Return its tokens."""
        new = min(budget, work.tokens + work.written - before)
        self.parts.append(Part(work, before, new))
        return new

    def _clip(self, work: Work) -> None:
        """Limit its new tokens to what fits into an empty pool, as the real server does."""
        room = room_alone(self._model, work)
        work.target = min(work.target, room)
        asked = room if work.max_new_tokens is None else min(work.max_new_tokens, room)
        work.max_new_tokens = max(work.target, asked)
