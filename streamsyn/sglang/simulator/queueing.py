from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from streamsyn.sglang.simulator.cache import BLOCK_TOKENS
from streamsyn.sglang.simulator.engine import Work
from streamsyn.sglang.simulator.radix import RadixCache

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
