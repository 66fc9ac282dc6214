"""Several measured runs: repeats until the median is known well enough, or a sweep of caps.

Runs follow each other, each with its own warm-up and drain. Each begins with seeds that the one before has
not used, whose prompts the servers do not have in their caches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Final, Literal

from streamsyn.bench.figures import figures, share_within
from streamsyn.bench.measured_run import RunToMeasure, measure
from streamsyn.bench.measurement import Measurement
from streamsyn.bench.plan import Plan
from streamsyn.bench.repeats import MedianInterval, median_interval
from streamsyn.bench.sweep import SweepPoint, knee, next_cap

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
