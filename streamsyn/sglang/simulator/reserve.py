from collections import deque
from collections.abc import Collection
from typing import Final

from streamsyn.sglang.simulator.engine import Work

INITIAL: Final = 0.7  # SGLANG_INIT_NEW_TOKEN_RATIO
LEAST: Final = INITIAL * 0.14  # SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR
DECAY: Final = (INITIAL - LEAST) / 600  # SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS
AHEAD_STEPS: Final = 20  # SGLANG_RETRACT_DECODE_STEPS
WINDOW_S: Final = 15.0  # SGLANG_CACHE_HIT_RATE_WINDOW_SECONDS


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
