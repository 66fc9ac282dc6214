"""Where groups are at home: spread by bounded hashing, moved only for load, and never more than one."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from streamsyn.fleet.affinity import PATIENCE_S, Affinity
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
    """At most the factor times its share, or one more than that where groups are few."""
    fleet, homes = servers(*[1.0] * number), Affinity(1.25, lambda: 0.0)
    found = Counter(homes.home(f"group {index}", fleet).url for index in range(groups))
    assert max(found.values()) <= max(1.25 * groups / number, groups / number + 1)


def test_weights_shift_groups() -> None:
    """A server of three times the weight is home to about three times as many."""
    fleet, homes = servers(3, 1, 1, 1), Affinity(1.25, lambda: 0.0)
    found = Counter(homes.home(f"group {index}", fleet).url for index in range(600))
    assert 0.4 <= found[fleet[0].url] / 600 <= 0.63


def test_the_same_groups_go_to_the_same_servers_in_every_process() -> None:
    """Placement goes by a hash that no interpreter changes, so a restarted run finds warm caches."""
    fleet, homes = servers(1, 1, 1, 1), Affinity(1.25, lambda: 0.0)
    found = [homes.home(f"group {index}", fleet).url[-7] for index in range(12)]
    again = [Affinity(1.25, lambda: 0.0).home("group 0", servers(1, 1, 1, 1)).url[-7] for _ in range(3)]
    assert [found[0]] * 3 == again
    assert "".join(found) == "023131023012"


def test_a_group_moves_only_when_its_server_is_over_for_long() -> None:
    """Up to the bound it stays, and beyond it for a while; then it goes, and stays where it went."""
    now = [0.0]
    fleet, homes = servers(1, 1, 1, 1, cap=1000), Affinity(1.25, lambda: now[0])
    home = homes.home("group", fleet)
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
        assert stays == (homes.home("group", fleet) is home)
    moved = homes.home("group", fleet)
    home.limiter.in_flight = 100
    assert moved is homes.home("group", fleet) is not home
    assert 1 == homes.moves
    assert [0, 0, 0, 1] == sorted(server.homes for server in fleet)


def test_a_hot_group_is_given_more_servers() -> None:
    """One group that brings all the work is not left at one server."""
    now = [0.0]
    fleet, homes = servers(1, 1, 1, 1, cap=1000), Affinity(1.25, lambda: now[0])
    for number in range(2000):
        now[0] = number / 100
        homes.home("hot", fleet).limiter.in_flight += 1
    assert max(server.limiter.in_flight for server in fleet) < 1.7 * 2000 / 4
    assert min(server.limiter.in_flight for server in fleet) > 0


def test_a_group_leaves_a_server_that_is_not_there() -> None:
    """And one that has just failed it, as long as there is another."""
    fleet, homes = servers(1, 1), Affinity(1.25, lambda: 0.0)
    home = homes.home("group", fleet)
    [other] = [server for server in fleet if server is not home]
    assert other is homes.home("group", fleet, avoid=home)
    assert home is homes.home("group", [home])
    homes.forget(home)
    assert other is homes.home("group", [other])
    assert (0, 1) == (home.homes, other.homes)
