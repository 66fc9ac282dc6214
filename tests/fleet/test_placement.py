"""Placement: places are given out in order, never above the cap, and no request waits beside a free one.

Groups are spread over the servers by bounded hashing, and move only for load.
"""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.errors import StoppedEarly
from streamsyn.fleet.affinity import PATIENCE_S, Affinity, fair_shares
from streamsyn.fleet.kv_pool import Footprint
from streamsyn.fleet.limiter import Limiter
from streamsyn.fleet.placement import Placement
from streamsyn.fleet.server import Place, Server
from streamsyn.fleet.shares import Share
from tests.builders import server_at
from tests.examples import examples, in_turn


def servers(*caps: int) -> list[Server]:
    """Servers that are never asked."""
    return [server_at(f"http://{number}", Limiter(cap)) for number, cap in enumerate(caps)]


def placed(fleet: list[Server], leader_wait_s: float = 60.0) -> Placement:
    """A placement on the running loop's clock."""
    clock = asyncio.get_running_loop().time
    return Placement(fleet, 1.25, leader_wait_s, clock)


def of(group: str = "", *beginnings: str) -> Footprint:
    """A request of a group."""
    return Footprint(group, beginnings)


async def settle() -> None:
    """Let every asyncio task run until it waits."""
    for _ in range(20):
        await asyncio.sleep(0)


async def acquired(placement: Placement, avoid: Server | None = None) -> Server:
    """Where a place is that must be free now."""
    return (await place(placement, of(), avoid)).server


async def place(placement: Placement, request: Footprint, avoid: Server | None = None) -> Place:
    """A place that must be free now."""
    async with asyncio.timeout(1):
        return await placement.acquire(request, avoid)


async def test_the_one_with_the_fewest_in_flight() -> None:
    """Requests spread evenly over the servers."""
    fleet = servers(3, 3, 3)
    placement = placed(fleet)
    given_out = [await place(placement, of()) for _ in range(7)]
    assert [2, 2, 3] == sorted(server.limiter.in_flight for server in fleet)
    for one in [one for one in given_out if one.server is fleet[1]][:2]:
        placement.release(one)
    assert fleet[1] is await acquired(placement)


async def test_equal_load_goes_to_the_server_with_fewest_completions() -> None:
    """With one request at a time, the servers still take turns."""
    fleet = servers(1, 1)
    fleet[0].completions = 5
    assert fleet[1] is await acquired(placed(fleet))


async def test_a_different_server_than_the_last() -> None:
    """A request that failed goes to a different server, even a fuller one, if there is room."""
    fleet = servers(3, 2)
    placement = placed(fleet)
    given_out = [await acquired(placement, avoid=fleet[0]) for _ in range(4)]
    assert [fleet[1], fleet[1], fleet[0], fleet[0]] == given_out


async def test_an_ejected_or_held_server_gets_nothing() -> None:
    """Not even when all others are full."""
    fleet = servers(1, 1)
    placement = placed(fleet)
    fleet[0].health.ejected = True
    assert fleet[1] is await acquired(placement)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(placement.acquire())
        await settle()
        assert not waiting.done()
        fleet[0].health.readmit()
        placement.dispatch()
    assert fleet[0] is waiting.result().server


async def test_a_hold_ends_by_itself() -> None:
    """A timer gives the place to the waiter."""
    [server] = fleet = servers(1)
    placement = placed(fleet)
    server.limiter.busy(asyncio.get_running_loop().time(), 0.0)
    assert server is await acquired(placement)
    placement.close()


async def test_waiters_are_served_in_order() -> None:
    """First come, first served."""
    [server] = fleet = servers(1)
    placement, order = placed(fleet), []

    async def wait(number: int) -> None:
        place = await placement.acquire()
        order.append(number)
        await settle()
        placement.release(place)

    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(wait(number))
    assert [0, 1, 2, 3, 4] == order
    assert 0 == server.limiter.in_flight


async def test_one_who_leaves_does_not_hold_up_the_others() -> None:
    """A cancelled waiter gets no place; the next one does."""
    [server] = fleet = servers(1)
    placement = placed(fleet)
    held = await placement.acquire()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(placement.acquire())
        second = group.create_task(placement.acquire())
        await settle()
        first.cancel()
        await settle()
        placement.release(held)
    assert first.cancelled()
    assert server is second.result().server
    assert 1 == server.limiter.in_flight


async def test_a_place_just_given_to_one_who_leaves_comes_back() -> None:
    """Cancelled after it got the place and before it ran: the next waiter gets the place."""
    [server] = fleet = servers(1)
    placement = placed(fleet)
    held = await placement.acquire()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(placement.acquire())
        second = group.create_task(placement.acquire())
        await settle()
        placement.release(held)  # the place is the first one's, who has not run since
        first.cancel()
    assert first.cancelled()
    assert server is second.result().server
    assert 1 == server.limiter.in_flight


async def test_a_group_stays_at_its_server() -> None:
    """Requests of a group go to one server and wait while it is full; groups are spread."""
    fleet = servers(*[8] * 4)
    placement = placed(fleet)
    homes: dict[str, Server] = {}
    for number in range(200):
        group = f"group {number % 16}"
        given = await place(placement, of(group))
        assert given.server is homes.setdefault(group, given.server)
        placement.release(given)
    assert max(Counter(server.url for server in homes.values()).values()) <= 1.25 * 16 / 4
    assert 0 == placement.moves


async def test_a_group_leaves_an_ejected_server() -> None:
    """Its waiting requests move too."""
    fleet = servers(1, 1)
    placement = placed(fleet)
    first = await place(placement, of("group"))
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(placement.acquire(of("group")))
        await settle()
        assert not waiting.done()
        first.server.health.ejected = True
        placement.withdraw(first.server)
    assert first.server is not waiting.result().server


async def test_an_idle_server_takes_over_who_waits_elsewhere() -> None:
    """After `PATIENCE_S` a free place counts more than a prefix, and the whole group moves."""
    fleet, now = servers(1, 1), [0.0]
    placement = Placement(fleet, 1.25, 60.0, lambda: now[0])
    first = await place(placement, of("group"))
    [other] = [server for server in fleet if server is not first.server]
    elsewhere = await place(placement, of())
    assert other is elsewhere.server
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(placement.acquire(of("group")))
        await settle()
        placement.release(elsewhere)
        await settle()
        assert not waiting.done()
        now[0] = PATIENCE_S
        placement.dispatch()
    assert other is waiting.result().server
    placement.release(waiting.result())
    assert other is (await place(placement, of("group"))).server


async def test_the_first_leads_and_the_others_follow() -> None:
    """While a prefix is brought into the cache, requests that share it wait; others do not."""
    fleet = servers(8)
    placement = placed(fleet)
    leader = await place(placement, of("", "template", "group"))
    assert ("template", "group") == leader.leads
    async with asyncio.TaskGroup() as group:
        followers = [group.create_task(placement.acquire(of("", "template", "group"))) for _ in range(3)]
        another = await place(placement, of("", "another"))
        assert ("another",) == another.leads
        await settle()
        assert [False] * 3 == [follower.done() for follower in followers]
        placement.warmed(leader)
    assert [()] * 3 == [follower.result().leads for follower in followers]
    assert () == (await place(placement, of("", "template"))).leads
    placement.close()


async def test_when_a_leader_fails_the_next_one_leads() -> None:
    """The prefix is still cold: one follower leads, the others keep waiting."""
    placement = placed(servers(8))
    leader = await place(placement, of("", "template"))
    async with asyncio.TaskGroup() as group:
        followers = [group.create_task(placement.acquire(of("", "template"))) for _ in range(3)]
        await settle()
        placement.release(leader)
        await settle()
        assert [True, False, False] == [follower.done() for follower in followers]
        assert ("template",) == followers[0].result().leads
        placement.warmed(followers[0].result())
    placement.close()


async def test_the_wait_for_a_leader_is_bounded() -> None:
    """After `leader_wait_s` the followers are sent."""
    placement = placed(servers(8), leader_wait_s=0.01)
    await place(placement, of("", "template"))
    assert () == (await place(placement, of("", "template"))).leads


async def test_a_drain_ends_all_waits() -> None:
    """No request waits for a place, a group's server or a leader; requests in flight stay."""
    [server] = fleet = servers(2)
    placement = placed(fleet)
    await place(placement, of("", "a"))

    async def fails(request: Footprint) -> None:
        with pytest.raises(StoppedEarly):
            await placement.acquire(request)

    async with asyncio.TaskGroup() as group:
        group.create_task(fails(of("", "a")))
        await settle()
        await place(placement, of())
        group.create_task(fails(of()))
        group.create_task(fails(of("group")))
        await settle()
        placement.drain()
    await fails(of())
    assert 2 == server.limiter.in_flight
    placement.close()


class Crowd:
    """Many who want places, for runs of different weights and of two models, and servers that come and go."""

    def __init__(self, group: asyncio.TaskGroup, caps: list[int]) -> None:
        self.servers = servers(*caps)
        self.placement = placed(self.servers)
        for number, server in enumerate(self.servers):  # the first serves both models, the others one of them
            server.models = ("", "other") if not number else ("",) if number % 2 else ("other",)
        self.shares = [Share(weight) for weight in (1 / 8, 1.0, 8.0)]
        self.group = group
        self.waiting: list[asyncio.Task[None]] = []
        self.holding: list[Place] = []

    async def step(self, name: str, number: int) -> None:
        """Do one thing; `number` picks who or where."""
        server = self.servers[number % len(self.servers)]
        match name:
            case "acquire":
                avoid = server if number % 2 else None
                group, template = GROUPS[number % len(GROUPS)], ("template",) if number % 3 else ()
                request = of(group, *template, *([group] if group else []))
                model, share = MODELS[number % 3], self.shares[number % 4 % 3]
                asking = self._acquire(request, avoid, model, share)
                self.waiting.append(self.group.create_task(asking))
            case "warm" if self.holding:
                self.placement.warmed(self.holding[number % len(self.holding)])
            case "release" if self.holding:
                self.placement.release(self.holding.pop(number % len(self.holding)))
            case "cancel" if self.waiting:
                self.waiting[number % len(self.waiting)].cancel()
            case "eject":
                server.health.ejected = True
                self.placement.withdraw(server)
            case "readmit":
                server.health.readmit()
                self.placement.dispatch()
            case "hold":
                server.limiter.held_until = float("inf")
            case "split":
                self.placement.withdraw(server, 1 + number % 3)
            case "unhold":
                server.limiter.held_until = 0.0
                self.placement.dispatch()
            case "step":
                await asyncio.sleep(0)
            case "settle":
                await settle()
                self.check_settled()
        self.check()

    def check(self) -> None:
        """True at every moment."""
        for server in self.servers:
            assert 0 <= server.limiter.in_flight <= server.limiter.cap

    def check_settled(self) -> None:
        """True when all have run until they wait."""
        self.waiting = [task for task in self.waiting if not task.done()]
        free = [server for server in self.servers if server.is_usable and server.limiter.has_room(0.0)]
        for model, queue in self.placement._queues.items():
            can = [server for server in free if model in server.models]
            assert not can or not queue.heads(), "beside a free place"
        for server in free:
            assert not [waiter for waiter in server.queue if not waiter.turn.done()], "beside a free place"
        leading = {(place.rank, key) for place in self.holding for key in place.leads}
        ranks = [rank for server in self.servers for rank in server.ranks]
        warming = {(rank, key) for rank in ranks for key in rank.warm_up.warming}
        assert warming <= leading, "followers of nobody"
        assert len(self.holding) == sum(server.limiter.in_flight for server in self.servers)
        held = Counter(place.rank for place in self.holding)
        assert [held[rank] for rank in ranks] == [rank.in_flight for rank in ranks]
        assert len(self.holding) == sum(share.in_flight for share in self.shares)
        assert len(self.waiting) == sum(share.waiting for share in self.shares)

    async def _acquire(self, request: Footprint, avoid: Server | None, model: str, share: Share) -> None:
        place = await self.placement.acquire(request, avoid, model, share)
        assert model == place.model
        assert model in place.server.models
        self.holding.append(place)

    async def end(self) -> None:
        """Everybody gets a place once there are some."""
        for server in self.servers:
            server.health.readmit()
            server.limiter.held_until = 0.0
        self.placement.dispatch()
        await settle()
        while self.holding:
            self.placement.release(self.holding.pop())
            await settle()
            self.check_settled()
        assert [] == self.waiting
        self.placement.close()


MODELS = ["", "other", ""]
GROUPS = ["", "", "red", "blue", "green"]
NAMES = st.sampled_from(
    ["acquire", "acquire", "acquire", "release", "release", "cancel", "step", "settle", "warm"]
)
STEPS = st.tuples(
    NAMES | st.sampled_from(["eject", "readmit", "hold", "unhold", "split"]), st.integers(0, 11)
)  # what everybody does, more often than what befalls a server


@examples(200)
@given(caps=st.lists(st.integers(1, 3), min_size=1, max_size=3), steps=st.lists(STEPS, max_size=40))
def test_places_are_never_lost_nor_doubled(caps: list[int], steps: list[tuple[str, int]]) -> None:
    """In any order of events, in flight stays between 0 and the cap, and no one waits beside a free place."""

    async def play() -> None:
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            crowd = Crowd(group, caps)
            for name, number in steps:
                await crowd.step(name, number)
            await settle()
            crowd.check_settled()
            await crowd.end()

    asyncio.run(play())


def weighted(*weights: float, cap: int = 64) -> list[Server]:
    """Servers that are never asked."""
    return [
        server_at(f"http://gpu-{number}:30000", Limiter(cap), weight) for number, weight in enumerate(weights)
    ]


@given(st.integers(1, 12), st.integers(1, 300))
def test_no_server_has_many_more_groups_than_its_share(number: int, groups: int) -> None:
    """At most the factor times its share, or one more where groups are few."""
    fleet, affinity = weighted(*[1.0] * number), Affinity[Server](1.25, lambda: 0.0)
    found = Counter(affinity.server_for(f"group {index}", fleet).url for index in range(groups))
    assert max(found.values()) <= max(1.25 * groups / number, groups / number + 1)


def test_weights_shift_groups() -> None:
    """A server of three times the weight gets about three times as many groups."""
    fleet, affinity = weighted(3, 1, 1, 1), Affinity[Server](1.25, lambda: 0.0)
    found = Counter(affinity.server_for(f"group {index}", fleet).url for index in range(600))
    assert 0.4 <= found[fleet[0].url] / 600 <= 0.63


def test_the_same_groups_go_to_the_same_servers_in_every_process() -> None:
    """The hash does not depend on the process, so a restarted run finds warm caches."""
    fleet, affinity = weighted(1, 1, 1, 1), Affinity[Server](1.25, lambda: 0.0)
    found = [affinity.server_for(f"group {index}", fleet).url[-7] for index in range(12)]
    again = [
        Affinity[Server](1.25, lambda: 0.0).server_for("group 0", weighted(1, 1, 1, 1)).url[-7]
        for _ in range(3)
    ]
    assert [found[0]] * 3 == again
    assert "".join(found) == "023131023012"


def test_a_group_moves_only_when_its_server_stays_overloaded() -> None:
    """It stays up to the bound, and beyond it for `PATIENCE_S`; then it moves once."""
    now = [0.0]
    fleet, affinity = weighted(1, 1, 1, 1, cap=1000), Affinity[Server](1.25, lambda: now[0])
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
    fleet, affinity = weighted(1, 1, 1, 1, cap=1000), Affinity[Server](1.25, lambda: now[0])
    for number in range(2000):
        now[0] = number / 100
        affinity.server_for("hot", fleet).limiter.in_flight += 1
    assert max(server.limiter.in_flight for server in fleet) < 1.7 * 2000 / 4
    assert min(server.limiter.in_flight for server in fleet) > 0


def test_a_group_leaves_an_unusable_server() -> None:
    """It also avoids a server that has just failed, if there is another."""
    fleet, affinity = weighted(1, 1), Affinity[Server](1.25, lambda: 0.0)
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


@in_turn(
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
