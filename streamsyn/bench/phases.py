"""The phases of a measured run: when its warm-up and its measured part end, and when its load was full.

The steady state is the longest interval in which the requests in flight are above a share of their usual
number. The growth at the start and the thinning out at the end are not in it. SGLang's `bench_serving` has
the same rule with the peak in place of the median; here a single burst would then leave out all the rest.
"""

from collections.abc import Sequence
from itertools import groupby
from statistics import median
from typing import Final

from streamsyn.bench.measurement import TICK_S, Interval, Load, RequestRecord

_WARM_UP_S, _WARM_UP_ANSWERS = 10.0, 2.0
"""An unspecified warm-up takes at least this long, and as many times the median duration of a request."""
_DURATION_S, _DURATION_ANSWERS = 30.0, 4.0
"""An unspecified measured part takes at least this long, and as many times that median."""
_GROWS, _GROWTH_S = 1.1, 5.0
"""Requests in flight grow if they are this many times those before this time, or before a median duration."""
_RECENT: Final = 2000
"""Latest requests that the median duration is of."""
_WARM_UP_SHARE: Final = 0.4
"""Most of the time limit that an unspecified warm-up takes."""
FULL_SHARE: Final = 0.8
"""Share of the median of the requests in flight from which the load is full."""
_BIN_S: Final = 1.0
_SHORTEST_BIN_S: Final = 0.05
_BINS: Final = 10
"""Bins that the measured part has at least, however short it is."""


class Phases:
    """Warm-up, measured part, drain. Without a clock of its own: `now` is in seconds since the run began.

    An unspecified warm-up ends once a generation of requests has been answered, it has taken twice the median
    duration of a request, and the requests in flight do not grow any more.

    Args:
        load: What was asked for.
        limit_s: Longest warm-up and measured part together.
        has_end: Whether the work ends by itself, as that of a replay: then the measured part lasts until what
            is in flight thins out, unless its duration was asked for.

    Attributes:
        warm_at: When the warm-up ended.
        measured_at: When the measured part ended: at its time, or because the run was stopped.
        was_cut: Whether the warm-up ended because of the limit.
        was_short: Whether the work ended before the warm-up did: then there is none.
    """

    def __init__(self, load: Load, limit_s: float, *, has_end: bool = False) -> None:
        self._load = load
        self._has_end = has_end
        self._limit_s = limit_s
        self._ends_at = 0.0
        self._past: list[tuple[float, int]] = []
        """Times and requests in flight."""
        self.warm_at: float | None = None
        self.measured_at: float | None = None
        self.was_cut = self.was_short = False

    def look(
        self,
        now: float,
        requests: Sequence[RequestRecord],
        in_flight: int,
        *,
        is_stopped: bool,
        work_ended: bool = False,
    ) -> float:
        """Take note of the time.

        Args:
            now: The time.
            requests: Requests that have ended.
            in_flight: Requests in flight.
            is_stopped: Whether nothing new is begun, since the run was stopped.
            work_ended: Whether no drafts are left to begin; those in flight may have more requests to send.

        Returns:
            When to look again.
        """
        self._past.append((now, in_flight))
        thins_out = work_ended and in_flight < FULL_SHARE * max(past for _, past in self._past)
        if (is_stopped or thins_out) and self.measured_at is None:
            self._end(now)
        if self.warm_at is None and self.measured_at is None and self._is_warm(now, requests, in_flight):
            self.warm_at = now
            self._ends_at = now + self._seconds_to_measure(now, requests)
        if self.warm_at is not None and self.measured_at is None and now >= self._ends_at:
            self.measured_at = now
        return min(now + TICK_S, self._next_end(now))

    def _end(self, now: float) -> None:
        self.measured_at = now
        if self._has_end and self.warm_at is None:
            self.warm_at, self.was_short = 0.0, True

    def _next_end(self, now: float) -> float:
        if self.measured_at is not None:
            return now + TICK_S
        if self.warm_at is None:
            return now + TICK_S if self._load.warmup_s is None else self._load.warmup_s
        return self._ends_at

    def _is_warm(self, now: float, requests: Sequence[RequestRecord], in_flight: int) -> bool:
        if self._load.warmup_s is not None:
            return now >= self._load.warmup_s
        if now >= _WARM_UP_SHARE * self._limit_s:
            self.was_cut = True
            return True
        typical_s = typical_seconds(requests[-_RECENT:])
        if now < max(_WARM_UP_S, _WARM_UP_ANSWERS * typical_s) or len(requests) < max(1, in_flight):
            return False
        before = max(past for at, past in self._past if at <= now - max(_GROWTH_S, typical_s))
        return in_flight <= _GROWS * before

    def _seconds_to_measure(self, now: float, requests: Sequence[RequestRecord]) -> float:
        if self._load.duration_s is not None:
            return self._load.duration_s
        if self._has_end:
            return max(TICK_S, self._limit_s - now)
        wanted = max(_DURATION_S, _DURATION_ANSWERS * typical_seconds(requests[-_RECENT:]))
        return max(TICK_S, min(wanted, self._limit_s - now))

    def intervals(self, ended_at: float) -> tuple[Interval, Interval, Interval]:
        """Return warm-up, measured part and drain of a run that ended at `ended_at`."""
        if self.measured_at is None:
            self._end(ended_at)
        measured_at = ended_at if self.measured_at is None else self.measured_at
        warm_at = measured_at if self.warm_at is None else self.warm_at
        return Interval(0.0, warm_at), Interval(warm_at, measured_at), Interval(measured_at, ended_at)


def steady_state(
    requests: Sequence[RequestRecord], measured: Interval, share: float = FULL_SHARE
) -> Interval | None:
    """Return the longest interval within `measured` with at least `share` of the median load.

    The load is the mean number of requests in flight in bins of a second, or of a tenth of a shorter
    measurement: between an answer and the next request there is always a moment with one less.

    Args:
        requests: All tries of the run.
        measured: The measured part.
        share: Share of the median, 0 to 1.

    Returns:
        The interval, or None if nothing was in flight.
    """
    if measured.seconds <= 0:
        return None
    bins = max(_BINS, round(measured.seconds / _BIN_S))
    if measured.seconds / bins < _SHORTEST_BIN_S:
        bins = 1
    width = measured.seconds / bins
    load = in_flight(requests, measured, bins)
    usual = median([number for number in load if number > 0] or [0.0])
    if usual <= 0:
        return None
    best, at = (0, 0), 0
    for is_full, group in groupby(load, lambda number: number >= share * usual):
        length = len(list(group))
        if is_full and length > best[1] - best[0]:
            best = (at, at + length)
        at += length
    return Interval(measured.begins_at + best[0] * width, measured.begins_at + best[1] * width)


def in_flight(requests: Sequence[RequestRecord], within: Interval, bins: int) -> list[float]:
    """Return the mean number of requests in flight in each of `bins` equal parts of an interval."""
    width = within.seconds / bins
    busy_s = [0.0] * bins
    whole = [0] * (bins + 1)
    """Requests in flight during a whole bin: the difference to the bin before."""
    for request in requests:
        begins = max(request.sent_at, within.begins_at) - within.begins_at
        ends = min(request.done_at, within.ends_at) - within.begins_at
        if ends <= begins:
            continue
        first, last = min(bins - 1, int(begins / width)), min(bins - 1, int(ends / width))
        if first == last:
            busy_s[first] += ends - begins
            continue
        busy_s[first] += (first + 1) * width - begins
        busy_s[last] += ends - last * width
        whole[first + 1] += 1
        whole[last] -= 1
    running, load = 0, []
    for number in range(bins):
        running += whole[number]
        load.append(running + busy_s[number] / width)
    return load


def typical_seconds(requests: Sequence[RequestRecord]) -> float:
    """Return the median duration of the answered requests; 0 without any."""
    durations = [request.server_s for request in requests if request.ended == "ok"]
    return median(durations) if durations else 0.0
