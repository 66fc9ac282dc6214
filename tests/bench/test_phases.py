"""When the warm-up and the measured part of a run end."""

import pytest

from streamsyn.bench.measurement import Interval, Load, RequestRecord
from streamsyn.bench.phases import Phases
from tests.bench.measured import request


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
