"""The steady state of a measured run: when the load on the servers was full.

The longest interval in which the requests in flight are above a share of their usual number. The growth at
the start and the thinning out at the end are not in it. SGLang's `bench_serving` has the same rule with the
peak in place of the median; here a single burst would then leave out all the rest.
"""

from collections.abc import Sequence
from itertools import groupby
from statistics import median
from typing import Final

from streamsyn.bench.measurement import Interval, RequestRecord

FULL_SHARE: Final = 0.8
"""Share of the median of the requests in flight from which the load is full."""
_BIN_S: Final = 1.0
_SHORTEST_BIN_S: Final = 0.05
_BINS: Final = 10
"""Bins that the measured part has at least, however short it is."""


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
