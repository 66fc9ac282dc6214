"""The steady state: the longest interval with a full load."""

import pytest

from streamsyn.bench.measurement import Interval, RequestRecord
from streamsyn.bench.steady_state import in_flight, steady_state, typical_seconds
from tests.bench.measured import request

MEASURED = Interval(100.0, 160.0)


def busy(begins_at: float, ends_at: float, number: int) -> list[RequestRecord]:
    """So many requests in flight all the time, each of 2 s."""
    slots = int((ends_at - begins_at) / 2)
    return [
        request(sent_at=begins_at + 2 * slot, done_at=begins_at + 2 * slot + 2)
        for slot in range(slots)
        for _ in range(number)
    ]


def test_a_ramp_and_a_thinning_out_are_left_out() -> None:
    """What is below 0.8 of the usual load."""
    requests = [*busy(100, 110, 3), *busy(110, 150, 10), *busy(150, 160, 7)]

    assert Interval(110.0, 150.0) == steady_state(requests, MEASURED)


def test_a_burst_does_not_leave_out_the_rest() -> None:
    """The load is compared with the median, not with the peak."""
    requests = [*busy(100, 160, 10), *busy(120, 122, 40)]

    assert MEASURED == steady_state(requests, MEASURED)


@pytest.mark.parametrize(("first", "second"), [((100, 120), (124, 160)), ((100, 136), (140, 160))])
def test_a_gap_splits_and_the_longer_part_counts(first: tuple[int, int], second: tuple[int, int]) -> None:
    """Of two steady intervals."""
    requests = [*busy(*first, 10), *busy(*second, 10)]
    begins_at, ends_at = max(first, second, key=lambda part: part[1] - part[0])

    assert Interval(begins_at, ends_at) == steady_state(requests, MEASURED)


def test_a_very_short_measurement_is_one_bin() -> None:
    """Its bins would be shorter than the moments between requests."""
    measured = Interval(100.0, 100.4)

    assert measured == steady_state([request(sent_at=100.0, done_at=100.2)], measured)


def test_the_moment_between_two_requests_is_not_a_gap() -> None:
    """One request at a time, each sent 50 ms after the answer before."""
    requests = [request(sent_at=100 + 0.5 * n, done_at=100.45 + 0.5 * n) for n in range(120)]

    assert MEASURED == steady_state(requests, MEASURED)


@pytest.mark.parametrize("requests", [[], busy(0, 100, 5), busy(160, 180, 5)])
def test_without_load_there_is_none(requests: list[RequestRecord]) -> None:
    """Requests of the warm-up and the drain are not load."""
    assert steady_state(requests, MEASURED) is None
    assert steady_state(requests, Interval(50.0, 50.0)) is None


def test_requests_count_by_their_time() -> None:
    """Also where they cross the edges of a bin or of the interval."""
    requests = [request(sent_at=-5.0, done_at=1.5), request(sent_at=0.25, done_at=0.75)]

    assert [1.5, 0.5, 0.0] == in_flight(requests, Interval(0.0, 3.0), 3)
    assert [1.0, 1.0] == in_flight([request(sent_at=0.0, done_at=2.0)], Interval(0.0, 2.0), 2)


def test_only_answers_have_a_typical_duration() -> None:
    """Failures come at once."""
    failed = request(sent_at=0.0, done_at=0.1, ended="error", error="ServerBusy")
    answered = [request(sent_at=0.0, done_at=seconds) for seconds in (1.0, 2.0, 9.0)]

    assert 2.0 == typical_seconds([failed, failed, *answered])
    assert 0.0 == typical_seconds([failed])
