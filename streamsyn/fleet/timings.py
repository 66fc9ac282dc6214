"""How long requests took: histograms with fixed buckets, as Prometheus has them."""

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

BOUNDS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the buckets in seconds; one more has all that is longer."""


class Histogram:
    """Counts durations in buckets."""

    __slots__ = ("_counts", "total_s")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self.total_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration."""
        self._counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Return for each upper bound how many durations were at most that long; the last one is `+Inf`."""
        bounds = [*map(str, BOUNDS_S), "+Inf"]
        return list(zip(bounds, accumulate(self._counts), strict=True))

    @property
    def count(self) -> int:
        """Number of durations."""
        return sum(self._counts)


@dataclass(slots=True, eq=False)
class Timings:
    """How long the requests of a run, or those at a server, took.

    Attributes:
        queue_wait: Until there was a place at a server, each try counted.
        time_to_first_token: From sending to the first token, of the answers that are streamed: those of
            requests that bring a shared prefix into a cache.
        request_duration: From sending to the whole answer.
    """

    queue_wait: Histogram = field(default_factory=Histogram)
    time_to_first_token: Histogram = field(default_factory=Histogram)
    request_duration: Histogram = field(default_factory=Histogram)
