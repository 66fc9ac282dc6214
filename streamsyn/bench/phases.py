"""Decides when the warm-up of a measured run ends, and when its measured part does."""

from collections.abc import Sequence
from typing import Final

from streamsyn.bench.measurement import TICK_S, Interval, Load, RequestRecord
from streamsyn.bench.steady_state import FULL_SHARE, typical_seconds

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
