"""Where throughput stops to grow in a series of caps."""

import pytest

from streamsyn.bench.series import FIRST_CAP, MIN_POINTS, SweepPoint, knee, next_cap, saturation


def series(tokens: dict[int, float], *, seats: int) -> list[SweepPoint]:
    """Points of a server with `seats` places: what is beyond them waits for its first token."""
    return [
        SweepPoint(cap, cap, rate, 0.1 + max(0, cap - seats) / seats, 1 + cap / max(1.0, rate))
        for cap, rate in tokens.items()
    ]


def test_the_knee_of_a_server_with_64_seats() -> None:
    """Throughput grows with the cap up to the seats, and not beyond."""
    points = series({cap: 100.0 * min(cap, 64) for cap in (4, 8, 16, 32, 64, 128, 256)}, seats=64)

    found = knee(points)

    assert found is not None
    assert (64, 1.0) == (found.point.load, found.share_of_peak)
    assert pytest.approx((100, 0), abs=1e-6) == (found.slope_before, found.slope_after)


def test_noise_and_the_order_of_points_do_not_move_it() -> None:
    """The fit is over all points."""
    noise = (1.01, 0.99, 1.02, 0.98, 1.0, 1.02, 0.99)
    caps = (4, 8, 16, 32, 64, 128, 256)
    tokens = {cap: 100.0 * min(cap, 64) * off for cap, off in zip(caps, noise, strict=True)}

    found = knee(list(reversed(series(tokens, seats=64))))

    assert found is not None
    assert found.point.load == 64


@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param({4: 1.0, 8: 2.0, 16: 2.0, 32: 2.0}, id="fewer than five points"),
        pytest.param({cap: 10.0 * cap for cap in (1, 2, 3, 4, 5, 6)}, id="it grows to the end"),
        pytest.param(
            {1: 100, 2: 200, 3: 250, 4: 300, 5: 350, 6: 400}, id="it bends, but keeps half of its slope"
        ),
        pytest.param({1: 10, 2: 20, 3: 20, 4: 20, 5: 20, 100: 300}, id="flat below 0.85 of the peak"),
        pytest.param(dict.fromkeys((1, 2, 3, 4, 5), 0.0), id="nothing was written"),
    ],
)
def test_no_knee(tokens: dict[int, float]) -> None:
    """Each condition of the rule alone refuses one."""
    assert knee(series(tokens, seats=8)) is None


def test_saturation_begins_where_requests_only_wait() -> None:
    """In flight and the time to the first token rise, throughput does not."""
    tokens = {cap: 100.0 * min(cap, 64) for cap in (16, 32, 64, 128, 256)}

    found = saturation(series(tokens, seats=64))

    assert found is not None
    assert found.load == 128
    assert saturation(series(tokens, seats=1000)) is None  # nobody waits
    assert saturation(series({**tokens, 512: 9000.0}, seats=64)) is None  # a later point has more
    stuck = [SweepPoint(cap, 64, 6400, cap / 64, 1) for cap in (64, 128, 256)]  # the cap is never reached
    assert saturation(stuck) is None


def test_caps_double_until_that_brings_hardly_more() -> None:
    """A series without given caps has the points that a knee needs."""
    points: list[SweepPoint] = []
    while (cap := next_cap(points)) is not None:
        points += series({cap: 100.0 * min(cap, 64)}, seats=64)

    assert [FIRST_CAP, 8, 16, 32, 64, 128] == [point.load for point in points]
    assert knee(points) is not None
    for seats in (1, 10**6):  # full from the start, and never
        points = []
        while (cap := next_cap(points)) is not None:
            points += series({cap: 100.0 * min(cap, seats)}, seats=seats)
        assert MIN_POINTS <= len(points) <= 11
