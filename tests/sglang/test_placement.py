"""Places in flight: given out fairly, never more than there are, and nobody waits beside a free one."""

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from streamsyn.sglang.client import ServerClient
from streamsyn.sglang.health import Health
from streamsyn.sglang.limiter import Limiter
from streamsyn.sglang.placement import Placement
from streamsyn.sglang.server import Server


def servers(*caps: int) -> list[Server]:
    """Servers that are never asked."""
    session: Any = None
    return [
        Server(ServerClient(f"http://{number}", session, 1.0), Limiter(cap), Health(3))
        for number, cap in enumerate(caps)
    ]


async def settle() -> None:
    """Let every asyncio task run until it waits."""
    for _ in range(20):
        await asyncio.sleep(0)


async def acquired(placement: Placement, avoid: Server | None = None) -> Server:
    """A place that must be free now."""
    async with asyncio.timeout(1):
        return await placement.acquire(avoid)


async def test_the_one_with_the_fewest_in_flight() -> None:
    """Requests spread evenly, whatever the order of the servers."""
    fleet = servers(3, 3, 3)
    placement = Placement(fleet)
    for _ in range(7):
        await acquired(placement)
    assert [2, 2, 3] == sorted(server.limiter.in_flight for server in fleet)
    placement.release(fleet[1])
    placement.release(fleet[1])
    assert fleet[1] is await acquired(placement)


async def test_of_equals_the_one_that_has_done_least() -> None:
    """With one request at a time, the servers still take turns."""
    fleet = servers(1, 1)
    fleet[0].completions = 5
    assert fleet[1] is await acquired(Placement(fleet))


async def test_another_one_than_the_last() -> None:
    """A request that failed somewhere goes elsewhere, even to a fuller server; if it must, back there."""
    fleet = servers(3, 2)
    placement = Placement(fleet)
    given_out = [await acquired(placement, avoid=fleet[0]) for _ in range(4)]
    assert [fleet[1], fleet[1], fleet[0], fleet[0]] == given_out


async def test_an_ejected_or_held_server_gets_nothing() -> None:
    """Not even when all others are full."""
    fleet = servers(1, 1)
    placement = Placement(fleet)
    fleet[0].health.ejected = True
    assert fleet[1] is await acquired(placement)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(placement.acquire())
        await settle()
        assert not waiting.done()
        fleet[0].health.readmit()
        placement.dispatch()
    assert fleet[0] is waiting.result()


async def test_a_hold_ends_by_itself() -> None:
    """Nobody needs to release or ask: a timer gives the place to the one who waits."""
    [server] = fleet = servers(1)
    placement = Placement(fleet)
    server.limiter.busy(asyncio.get_running_loop().time(), 0.0)
    assert server is await acquired(placement)
    placement.close()


async def test_waiters_are_served_in_order() -> None:
    """First come, first served; one who comes later does not overtake."""
    [server] = fleet = servers(1)
    placement, order = Placement(fleet), []

    async def wait(number: int) -> None:
        await placement.acquire()
        order.append(number)
        await settle()
        placement.release(server)

    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(wait(number))
    assert [0, 1, 2, 3, 4] == order
    assert 0 == server.limiter.in_flight


async def test_one_who_leaves_does_not_hold_up_the_others() -> None:
    """A cancelled waiter gets no place; the next one does."""
    [server] = fleet = servers(1)
    placement = Placement(fleet)
    await placement.acquire()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(placement.acquire())
        second = group.create_task(placement.acquire())
        await settle()
        first.cancel()
        await settle()
        placement.release(server)
    assert first.cancelled()
    assert server is second.result()
    assert 1 == server.limiter.in_flight


async def test_a_place_just_given_to_one_who_leaves_comes_back() -> None:
    """Cancelled between getting the place and hearing of it: the next one has it."""
    [server] = fleet = servers(1)
    placement = Placement(fleet)
    await placement.acquire()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(placement.acquire())
        second = group.create_task(placement.acquire())
        await settle()
        placement.release(server)  # the place is the first one's, who has not run since
        first.cancel()
    assert first.cancelled()
    assert server is second.result()
    assert 1 == server.limiter.in_flight


class Crowd:
    """Many who want places, and servers that come and go."""

    def __init__(self, group: asyncio.TaskGroup, caps: list[int]) -> None:
        self.servers = servers(*caps)
        self.placement = Placement(self.servers)
        self.group = group
        self.waiting: list[asyncio.Task[None]] = []
        self.holding: list[Server] = []

    async def step(self, name: str, number: int) -> None:
        """Do one thing; `number` picks who or where."""
        server = self.servers[number % len(self.servers)]
        match name:
            case "acquire":
                avoid = server if number % 2 else None
                self.waiting.append(self.group.create_task(self._acquire(avoid)))
            case "release" if self.holding:
                self.placement.release(self.holding.pop(number % len(self.holding)))
            case "cancel" if self.waiting:
                self.waiting[number % len(self.waiting)].cancel()
            case "eject":
                server.health.ejected = True
            case "readmit":
                server.health.readmit()
                self.placement.dispatch()
            case "hold":
                server.limiter.held_until = float("inf")
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
        free = [server.url for server in self.servers if server.is_usable(0.0)]
        assert not self.waiting or [] == free
        assert len(self.holding) == sum(server.limiter.in_flight for server in self.servers)

    async def _acquire(self, avoid: Server | None) -> None:
        self.holding.append(await self.placement.acquire(avoid))

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


NAMES = st.sampled_from(["acquire", "acquire", "acquire", "release", "release", "cancel", "step", "settle"])
STEPS = st.tuples(
    NAMES | st.sampled_from(["eject", "readmit", "hold", "unhold"]), st.integers(0, 11)
)  # what everybody does, more often than what befalls a server


@settings(max_examples=200, deadline=None)
@given(caps=st.lists(st.integers(1, 3), min_size=1, max_size=3), steps=st.lists(STEPS, max_size=40))
def test_places_are_never_lost_nor_doubled(caps: list[int], steps: list[tuple[str, int]]) -> None:
    """Through any order of events: never above a cap, never below zero, nobody waits beside a free place."""

    async def play() -> None:
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            crowd = Crowd(group, caps)
            for name, number in steps:
                await crowd.step(name, number)
            await settle()
            crowd.check_settled()
            await crowd.end()

    asyncio.run(play())
