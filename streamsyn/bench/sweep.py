"""A series of measurements with more and more requests in flight: where throughput stops to grow.

The knee is the cap beyond which more requests in flight bring hardly more tokens/s: the break of a fit of
two lines. Saturation begins where they only wait: in flight and time to first token rise, and throughput does
not.
The rules are those of GuideLLM 0.8 (https://github.com/vllm-project/guidellm).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy

MIN_POINTS: Final = 5
"""Points that a knee needs."""
MAX_SLOPE_RATIO: Final = 0.25
"""Slope after the knee, as a share of the slope before it, at most."""
MIN_SHARE_OF_PEAK: Final = 0.85
"""Throughput at the knee, as a share of the highest one, at least."""
_PAYS: Final = 1.05
"""More load pays when throughput is more than this many times that with less."""
_RISES: Final = 1.1
"""In flight and time to first token rise when they are more than this many times those before."""
FIRST_CAP: Final = 4
_FACTOR: Final = 2
_LAST_CAP: Final = 4096


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One measurement of a series.

    Attributes:
        load: The cap in flight a server, or the rate in drafts/s.
        in_flight: Mean requests in flight at all servers.
        tokens_per_s: Completion tokens per second of all servers.
        first_token_s: Median time to the first token; None if no answer was streamed.
        latency_s: Median time of a request, from sending to its end.
    """

    load: float
    in_flight: float
    tokens_per_s: float
    first_token_s: float | None
    latency_s: float


@dataclass(frozen=True, slots=True)
class Knee:
    """Where more load stops to pay: slopes in tokens/s for each unit of load."""

    point: SweepPoint
    slope_before: float
    slope_after: float
    share_of_peak: float


def knee(points: Sequence[SweepPoint]) -> Knee | None:
    """Return the knee: of the breaks at a measured load that satisfy the rule, the one with the best fit.

    Each fit is two lines that meet at the break, by least squares. There is none with fewer than `MIN_POINTS`
    points, or if throughput grows to the end, or fits no break.
    """
    points = sorted(points, key=lambda point: point.load)
    if len(points) < MIN_POINTS:
        return None
    load = numpy.array([point.load for point in points])
    tokens = numpy.array([point.tokens_per_s for point in points])
    peak = float(tokens.max())
    found: list[tuple[float, Knee]] = []
    for point in points[1:-1]:
        terms = numpy.stack([numpy.ones_like(load), load, numpy.maximum(0.0, load - point.load)], axis=1)
        solution = numpy.linalg.lstsq(terms, tokens, rcond=None)[0]
        error = float(((terms @ solution - tokens) ** 2).sum())
        before, after = float(solution[1]), float(solution[1] + solution[2])
        share = point.tokens_per_s / peak if peak else 0.0
        if before > 0 and after <= MAX_SLOPE_RATIO * before and share >= MIN_SHARE_OF_PEAK:
            found.append((error, Knee(point, before, after, share)))
    return min(found, key=lambda fit: fit[0])[1] if found else None


def saturation(points: Sequence[SweepPoint]) -> SweepPoint | None:
    """Return the first point at which requests only wait longer: nothing beyond it has more throughput.

    Where no answer was streamed, the time of the whole request counts in place of that to the first token.
    """
    points = sorted(points, key=lambda point: point.load)
    for number in range(1, len(points)):
        before, here = points[number - 1], points[number]
        waits_longer = _wait(here, before) > _RISES * _wait(before, here)
        has_more = any(point.tokens_per_s > _PAYS * before.tokens_per_s for point in points[number:])
        if here.in_flight > _RISES * before.in_flight and waits_longer and not has_more:
            return here
    return None


def _wait(point: SweepPoint, other: SweepPoint) -> float:
    if point.first_token_s is None or other.first_token_s is None:
        return point.latency_s
    return point.first_token_s


def next_cap(points: Sequence[SweepPoint]) -> int | None:
    """Return the next cap of a series without given ones: twice the last, until that brings hardly more.

    None ends the series.
    """
    if not points:
        return FIRST_CAP
    *before, last = points
    pays = last.tokens_per_s > _PAYS * max((point.tokens_per_s for point in before), default=0.0)
    cap = int(last.load) * _FACTOR
    return cap if (pays or len(points) < MIN_POINTS) and cap <= _LAST_CAP else None
