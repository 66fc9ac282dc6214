"""Groups and their servers: spread by bounded hashing, moved only for load, one server per group."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.fleet.affinity import PATIENCE_S, Affinity, fair_shares
from streamsyn.fleet.limiter import Limiter
from streamsyn.fleet.server import Server
from tests.builders import server_at


def servers(*weights: float, cap: int = 64) -> list[Server]:
    """Servers that are never asked."""
    return [
        server_at(f"http://gpu-{number}:30000", Limiter(cap), weight) for number, weight in enumerate(weights)
    ]


@given(st.integers(1, 12), st.integers(1, 300))
def test_no_server_has_many_more_groups_than_its_share(number: int, groups: int) -> None:
    """At most the factor times its share, or one more where groups are few."""
    fleet, affinity = servers(*[1.0] * number), Affinity(1.25, lambda: 0.0)
    found = Counter(affinity.server_for(f"group {index}", fleet).url for index in range(groups))
    assert max(found.values()) <= max(1.25 * groups / number, groups / number + 1)


def test_weights_shift_groups() -> None:
    """A server of three times the weight gets about three times as many groups."""
    fleet, affinity = servers(3, 1, 1, 1), Affinity(1.25, lambda: 0.0)
    found = Counter(affinity.server_for(f"group {index}", fleet).url for index in range(600))
    assert 0.4 <= found[fleet[0].url] / 600 <= 0.63


def test_the_same_groups_go_to_the_same_servers_in_every_process() -> None:
    """The hash does not depend on the process, so a restarted run finds warm caches."""
    fleet, affinity = servers(1, 1, 1, 1), Affinity(1.25, lambda: 0.0)
    found = [affinity.server_for(f"group {index}", fleet).url[-7] for index in range(12)]
    again = [Affinity(1.25, lambda: 0.0).server_for("group 0", servers(1, 1, 1, 1)).url[-7] for _ in range(3)]
    assert [found[0]] * 3 == again
    assert "".join(found) == "023131023012"


def test_a_group_moves_only_when_its_server_stays_overloaded() -> None:
    """It stays up to the bound, and beyond it for `PATIENCE_S`; then it moves once."""
    now = [0.0]
    fleet, affinity = servers(1, 1, 1, 1, cap=1000), Affinity(1.25, lambda: now[0])
    home = affinity.server_for("group", fleet)
    for server in fleet:
        server.limiter.in_flight = 100
    for in_flight, at, stays in (
        (120, 0.0, True),
        (200, 10.0, True),  # from here on it is over
        (200, 10.0 + 0.9 * PATIENCE_S, True),
        (120, 12.0, True),
        (200, 20.0, True),  # again, anew
        (200, 20.0 + PATIENCE_S, False),
    ):
        home.limiter.in_flight, now[0] = in_flight, at
        assert stays == (affinity.server_for("group", fleet) is home)
    moved = affinity.server_for("group", fleet)
    home.limiter.in_flight = 100
    assert moved is affinity.server_for("group", fleet) is not home
    assert 1 == affinity.moves
    assert [0, 0, 0, 1] == sorted(server.groups for server in fleet)


def test_a_hot_group_is_given_more_servers() -> None:
    """One group that brings all the work is not left at one server."""
    now = [0.0]
    fleet, affinity = servers(1, 1, 1, 1, cap=1000), Affinity(1.25, lambda: now[0])
    for number in range(2000):
        now[0] = number / 100
        affinity.server_for("hot", fleet).limiter.in_flight += 1
    assert max(server.limiter.in_flight for server in fleet) < 1.7 * 2000 / 4
    assert min(server.limiter.in_flight for server in fleet) > 0


def test_a_group_leaves_an_unusable_server() -> None:
    """It also avoids a server that has just failed, if there is another."""
    fleet, affinity = servers(1, 1), Affinity(1.25, lambda: 0.0)
    home = affinity.server_for("group", fleet)
    [other] = [server for server in fleet if server is not home]
    assert other is affinity.server_for("group", fleet, avoid=home)
    assert home is affinity.server_for("group", [home])
    affinity.forget(home)
    assert other is affinity.server_for("group", [other])
    assert (0, 1) == (home.groups, other.groups)


def capped(*caps: int, weights: tuple[float, ...] = ()) -> list[Server]:
    """Servers of these caps, of weight 1 unless `weights` are given."""
    return [
        server_at(f"http://gpu-{number}:30000", Limiter(cap), weights[number] if weights else 1.0)
        for number, cap in enumerate(caps)
    ]


@pytest.mark.parametrize(
    ("fleet", "total", "expected"),
    [
        (capped(8, 100), 10, [5, 5]),  # caps that are not reached do not count
        (capped(8, 100), 40, [8, 32]),  # the small one is full
        (capped(8, 100), 128, [18, 110]),  # both are full, and the requests that wait are spread evenly
        (capped(100, 100, weights=(3, 1)), 40, [30, 10]),
        (capped(10, 100, weights=(3, 1)), 40, [10, 30]),
        (capped(5, 5, 50), 30, [5, 5, 20]),
    ],
)
def test_fair_shares_follow_weights_up_to_the_caps(
    fleet: list[Server], total: int, expected: list[float]
) -> None:
    """Even shares, none above its cap as long as there is room elsewhere."""
    assert expected == fair_shares(fleet, total)


@given(
    st.lists(st.tuples(st.integers(1, 500), st.floats(0.1, 10)), min_size=1, max_size=20),
    st.integers(1, 5000),
)
def test_fair_shares_add_up(parts: list[tuple[int, float]], total: int) -> None:
    """No request is lost, and a server is above its cap only when all of them are full."""
    caps, weights = zip(*parts, strict=True)
    shares = fair_shares(capped(*caps, weights=weights), total)
    assert total == pytest.approx(sum(shares))
    full = total >= sum(caps)
    assert full or all(share <= cap + 1e-6 for share, cap in zip(shares, caps, strict=True))
