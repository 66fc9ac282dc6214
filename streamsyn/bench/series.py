"""Several measured runs: repeats until the median is known well enough, or a sweep of caps.

Runs follow each other, each with its own warm-up and drain. Each begins with seeds that the one before has
not used, whose prompts the servers do not have in their caches.

The knee of a sweep is the cap beyond which more requests in flight bring hardly more tokens/s: the break of a
fit of two lines. Saturation begins where they only wait: in flight and time to first token rise, and
throughput does not. The rules are those of GuideLLM 0.8 (https://github.com/vllm-project/guidellm).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import comb
from statistics import median
from typing import Any, Final, Literal

import numpy

from streamsyn.bench.figures import figures, share_within
from streamsyn.bench.measured_run import RunToMeasure, measure
from streamsyn.bench.measurement import Measurement
from streamsyn.bench.plan import Plan

CONFIDENCE: Final = 0.95
NARROW: Final = 0.03
"""Width of the confidence interval, as a share of the median, that ends the repeats."""


@dataclass(frozen=True, slots=True)
class MedianInterval:
    """The median of repeated measurements and its confidence interval.

    Attributes:
        median: The median.
        low: Lower end of the interval; None if there are too few values for the confidence.
        high: Upper end.
    """

    median: float
    low: float | None
    high: float | None

    @property
    def width(self) -> float | None:
        """Width of the interval as a share of the median; None without an interval."""
        if self.low is None or self.high is None or not self.median:
            return None
        return (self.high - self.low) / abs(self.median)

    @property
    def is_narrow(self) -> bool:
        """Whether further repeats are not needed."""
        return self.width is not None and self.width < NARROW


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> MedianInterval:
    """Return the median of `values` and its confidence interval, which assumes no distribution.

    The interval is that of the order statistics: the k-th lowest and the k-th highest value, where the median
    is outside with the probability 2 * P(Binomial(n, 1/2) < k). From 6 values on there is one at 95 %.

    Source: Conover, "Practical Nonparametric Statistics", 3.2.

    Raises:
        ValueError: `values` is empty.
    """
    if not values:
        raise ValueError("no values")
    ordered, number = sorted(values), len(values)
    outside, k = 0.0, 0
    while True:
        outside += 2 * comb(number, k) / 2**number
        if outside > 1 - confidence or k >= number // 2:
            break
        k += 1
    if k == 0:
        return MedianInterval(median(ordered), None, None)
    return MedianInterval(median(ordered), ordered[k - 1], ordered[number - k])


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


Measured = Callable[[Measurement], None]
_SWEEP_RUNS: Final = 6
"""Runs of a sweep without given caps, by which its time limit is divided at first."""


def repeated(
    asked: RunToMeasure, repeats: int | None, on_measured: Measured = lambda _: None
) -> list[Measurement]:
    """Measure a number of times.

    Args:
        asked: What is to be measured; its `limit_s` is that of all runs together.
        repeats: How often; None: until the confidence interval of the median is narrow.
        on_measured: Called after each run.

    Returns:
        The measurements; the last one may have been stopped.
    """
    found: list[Measurement] = []
    for run in _runs(asked, found):
        found.append(run)
        on_measured(run)
        if not run.is_complete or len(found) == repeats:
            break
        if repeats is None and throughput_interval(found).is_narrow:
            break
    return found


def _runs(asked: RunToMeasure, found: Sequence[Measurement]) -> Iterator[Measurement]:
    """Measure until there is not enough time left for one more."""
    left_s = asked.limit_s
    while not found or left_s >= found[-1].drain.begins_at:
        yield measure(
            replace(
                asked,
                limit_s=left_s,
                skip=_skip(asked, found),
                seed=asked.seed + len(found),
            )
        )
        left_s -= found[-1].drain.ends_at


def _skip(asked: RunToMeasure, found: Sequence[Measurement]) -> int:
    """Return the number of seeds whose prompts servers may have in their caches; simulated ones are new."""
    return asked.skip if asked.simulated is not None else asked.skip + sum(one.seeds_read for one in found)


def swept(
    asked: RunToMeasure, caps: Sequence[int], on_measured: Measured = lambda _: None
) -> list[Measurement]:
    """Measure with one fixed cap after the other.

    Args:
        asked: What is to be measured; its `limit_s` is that of all runs together.
        caps: Requests in flight a server; empty: doubled until throughput grows no more.
        on_measured: Called after each run.
    """
    found: list[Measurement] = []
    left_s, expected = asked.limit_s, len(caps) or _SWEEP_RUNS
    while left_s > 0:
        cap = next_cap(sweep_points(found)) if not caps else next(iter(caps[len(found) :]), None)
        if cap is None:
            break
        run = measure(
            replace(
                asked,
                load=replace(asked.load, cap=cap),
                limit_s=left_s / max(1, expected - len(found)),
                skip=_skip(asked, found),
            )
        )
        found.append(run)
        on_measured(run)
        left_s -= run.drain.ends_at
        is_answered = len(sweep_points(found)) == len(found)  # more in flight would not be answered either
        if not (run.is_complete and is_answered):
            break
    return found


def sweep_points(runs: Sequence[Measurement]) -> list[SweepPoint]:
    """Return the points of a sweep; a run in which nothing was answered has none."""
    return [point for point in map(_point, runs) if point is not None]


def _point(run: Measurement) -> SweepPoint | None:
    window = run.window
    answered = [one for one in run.requests if one.ended == "ok" and window.holds(one.done_at)]
    if not answered or run.load.cap == "auto":
        return None
    first = [one.first_token_at - one.sent_at for one in answered if one.first_token_at is not None]
    busy_s = sum(share_within(one, window) * one.server_s for one in run.requests)
    return SweepPoint(
        load=run.load.cap,
        in_flight=busy_s / window.seconds,
        tokens_per_s=figures(run).written_tokens_per_s,
        first_token_s=median(first) if first else None,
        latency_s=median(one.server_s for one in answered),
    )


def throughput_interval(runs: Sequence[Measurement]) -> MedianInterval:
    """Return the median of the useful tokens per second of repeated runs, with its confidence interval.

    Raises:
        ValueError: `runs` is empty.
    """
    complete = [run for run in runs if run.is_complete] or runs
    return median_interval([figures(run).useful_tokens_per_s for run in complete])


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """All that one `streamsyn bench` has measured.

    Attributes:
        kind: Whether the runs repeat each other, or are a sweep of caps.
        runs: At least one run.
        asked: What was asked for, as JSON values: recipe, seeds, options.
        plan: What a seed set takes on the simulated fleet, if there is one.
    """

    kind: Literal["repeats", "sweep"]
    runs: Sequence[Measurement]
    asked: dict[str, Any]
    plan: Plan | None = None

    @property
    def typical(self) -> Measurement:
        """The run that stands for all: that of the knee of a sweep, else the one next to the median.

        A sweep without a knee is represented by its best run.
        """
        complete = [run for run in self.runs if run.is_complete] or list(self.runs)
        throughput = {id(run): figures(run).useful_tokens_per_s for run in complete}
        if self.kind == "sweep":
            found = knee(sweep_points(complete))
            at_knee = [run for run in complete if found is not None and run.load.cap == found.point.load]
            return at_knee[0] if at_knee else max(complete, key=lambda run: throughput[id(run)])
        middle = throughput_interval(complete).median
        return min(complete, key=lambda run: abs(throughput[id(run)] - middle))
