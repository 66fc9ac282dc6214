"""Where groups are at home: spread by bounded hashing, moved only for load, and never more than one."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from streamsyn.sglang.homes import Homes
from streamsyn.sglang.limiter import Limiter
from streamsyn.sglang.server import Server
from tests.builders import server_at


def servers(*weights: float, cap: int = 64) -> list[Server]:
    """Servers that are never asked."""
    return [
        server_at(f"http://gpu-{number}:30000", Limiter(cap), weight) for number, weight in enumerate(weights)
    ]


@given(st.integers(1, 12), st.integers(1, 300))
def test_no_server_has_many_more_groups_than_its_share(number: int, groups: int) -> None:
    """At most the factor times its share, or one more than that where groups are few."""
    fleet, homes = servers(*[1.0] * number), Homes(1.25)
    found = Counter(homes.home(f"group {index}", fleet).url for index in range(groups))
    assert max(found.values()) <= max(1.25 * groups / number, groups / number + 1)


def test_weights_shift_groups() -> None:
    """A server of three times the weight is home to about three times as many."""
    fleet, homes = servers(3, 1, 1, 1), Homes(1.25)
    found = Counter(homes.home(f"group {index}", fleet).url for index in range(600))
    assert 0.4 <= found[fleet[0].url] / 600 <= 0.63


def test_the_same_groups_go_to_the_same_servers_in_every_process() -> None:
    """Placement goes by a hash that no interpreter changes, so a restarted run finds warm caches."""
    fleet, homes = servers(1, 1, 1, 1), Homes(1.25)
    found = [homes.home(f"group {index}", fleet).url[-7] for index in range(12)]
    again = [Homes(1.25).home("group 0", servers(1, 1, 1, 1)).url[-7] for _ in range(3)]
    assert [found[0]] * 3 == again
    assert "".join(found) == "023131023012"


def test_a_group_moves_only_when_its_server_is_over() -> None:
    """Up to the bound it stays; beyond, it goes, and then stays where it went."""
    fleet, homes = servers(1, 1, 1, 1), Homes(1.25)
    home = homes.home("group", fleet)
    for server in fleet:
        server.limiter.in_flight = 100
    home.limiter.in_flight = 120
    assert home is homes.home("group", fleet)
    home.limiter.in_flight = 200
    moved = homes.home("group", fleet)
    home.limiter.in_flight = 100
    assert home is not moved
    assert moved is homes.home("group", fleet)
    assert 1 == homes.moves
    assert [0, 0, 0, 1] == sorted(server.homes for server in fleet)


def test_a_group_leaves_a_server_that_is_not_there() -> None:
    """And one that has just failed it, as long as there is another."""
    fleet, homes = servers(1, 1), Homes(1.25)
    home = homes.home("group", fleet)
    [other] = [server for server in fleet if server is not home]
    assert other is homes.home("group", fleet, avoid=home)
    assert home is homes.home("group", [home])
    homes.forget(home)
    assert other is homes.home("group", [other])
    assert (0, 1) == (home.homes, other.homes)
