"""When the warm-up and the measured part of a run end, and when its load was full."""

import pytest

from streamsyn.bench.measurement import Interval, Load, RequestRecord
from streamsyn.bench.phases import Phases, in_flight, steady_state, typical_seconds
from tests.bench.measured import request

MEASURED = Interval(100.0, 160.0)


def play(
    phases: Phases,
    in_flight: list[int],
    seconds: float,
    over_at: float = float("inf"),
    work_ends_at: float = float("inf"),
) -> tuple[float | None, float | None]:
    """Look whenever asked to, for two minutes: requests take `seconds`, so many are in flight each second.

    Returns when the warm-up and the measured part ended.
    """
    ended: list[RequestRecord] = []
    now, counted = 0.0, -1
    while now < 120 and phases.measured_at is None:
        if int(now) > counted:
            counted = int(now)
            number = in_flight[min(counted, len(in_flight) - 1)]
            if now >= seconds:
                ended += [request(sent_at=now - seconds, done_at=now)] * max(1, round(number / seconds))
        now = phases.look(now, ended, number, is_stopped=now >= over_at, work_ended=now >= work_ends_at)
    return phases.warm_at, phases.measured_at


@pytest.mark.parametrize(("warmup_s", "duration_s"), [(5.0, 7.5), (0.0, 0.5), (2.25, 1.0)])
def test_what_is_asked_for_is_kept_exactly(warmup_s: float, duration_s: float) -> None:
    """Also between two ticks."""
    load = Load(warmup_s=warmup_s, duration_s=duration_s)

    assert (warmup_s, warmup_s + duration_s) == play(Phases(load, 900.0), [8], 1.0)


def test_short_requests_are_warm_after_ten_seconds() -> None:
    """And measured for thirty."""
    assert (10.0, 40.0) == play(Phases(Load(), 900.0), [8], 1.0)


def test_long_requests_take_longer() -> None:
    """Twice their time, and four times their time to measure."""
    assert (24.0, 72.0) == play(Phases(Load(), 900.0), [8], 12.0)


def test_a_cap_that_grows_is_not_warm() -> None:
    """It grows by a tenth within 5 s until the 30th second."""
    warm_at, _ = play(Phases(Load(), 900.0), [round(20 * 1.03**second) for second in range(31)], 1.0)

    assert warm_at is not None
    assert 30 <= warm_at <= 35


def test_the_time_limit_ends_the_warm_up() -> None:
    """With 40 % of it, and that is noted."""
    phases = Phases(Load(), 50.0)

    assert (20.0, 50.0) == play(phases, [8], 60.0)
    assert phases.was_cut


def test_a_run_that_is_stopped_is_measured_until_then() -> None:
    """Or not at all."""
    phases = Phases(Load(warmup_s=5.0, duration_s=60.0), 900.0)
    assert (5.0, 30.0) == play(phases, [8], 1.0, over_at=29.5)
    assert (Interval(0.0, 5.0), Interval(5.0, 30.0), Interval(30.0, 33.0)) == phases.intervals(33.0)

    early = Phases(Load(), 900.0)
    assert (None, 1.0) == play(early, [8], 1.0, over_at=1.0)
    assert (Interval(0.0, 1.0), Interval(1.0, 1.0), Interval(1.0, 6.0)) == early.intervals(6.0)


def test_work_that_ends_by_itself_is_measured_until_it_thins_out() -> None:
    """Drafts in flight may have more steps; from the beginning, if that is within the warm-up."""
    long = Phases(Load(warmup_s=5.0), 900.0, has_end=True)
    in_flight = [8] * 90 + [7] * 10 + [6]
    assert (5.0, 100.0) == play(long, in_flight, 1.0, work_ends_at=80.0)

    short = Phases(Load(), 900.0, has_end=True)
    assert (0.0, 4.0) == play(short, [8, 8, 8, 8, 2], 1.0, work_ends_at=1.0)
    assert short.was_short

    assert (Interval(0.0, 0.0), Interval(0.0, 3.0)) == Phases(Load(), 900.0, has_end=True).intervals(3.0)[:2]


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
