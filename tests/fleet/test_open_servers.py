"""Many runs over one set of servers, in virtual time."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random
from typing import Any

import pytest

from streamsyn.config.sections import FleetSection
from streamsyn.errors import ConfigError, StoppedEarly
from streamsyn.fleet.fleet import Fleet
from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.fleet.shared_servers import ServerEdits, Servers, open_servers
from streamsyn.fleet.shares import Priority
from streamsyn.records import Request
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation

URLS = [f"http://server-{number}:1" for number in range(3)]
QUESTION = Request([{"role": "user", "content": "About geese."}], {})


class Shared:
    """Simulated servers with a fixed number of places each, shared by runs."""

    def __init__(self, *models: str, places: int = 8) -> None:
        self.places = places
        self.simulations = {
            url: Simulation(SimulatorConfig(latency_ms=1_000, model=model))
            for url, model in zip(URLS, models or ("one",) * len(URLS), strict=False)
        }
        self.in_process = InProcessServers(self.simulations)

    def run(self, test: Callable[[Servers], Coroutine[Any, Any, None]], *used: str, **section: Any) -> None:
        """Run `test` with the servers `used` at the start."""

        async def main() -> None:
            settings = FleetSection(servers=used, concurrency=self.places, give_up_s=5, **section)
            async with open_servers(settings, {}, self.in_process.connect, Random(0)) as servers:
                await test(servers)

        self.in_process.run(main(), limit_s=10_000)


class Load:
    """A run that keeps `capacity` requests of its own asked for, and counts its answers."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.answers = 0
        self.servers: Counter[str] = Counter()
        self.most_asked = 0

    @classmethod
    @asynccontextmanager
    async def on(
        cls, servers: Servers, weight: float = 1.0, priority: Priority = "normal", **section: Any
    ) -> AsyncIterator["Load"]:
        """Ask until the end of the block."""
        async with servers.fleet(FleetSection(**section), weight, priority) as fleet:
            await fleet.ask_models()
            load = cls(fleet)
            async with asyncio.TaskGroup() as group:
                asking: set[asyncio.Task[None]] = set()

                def grow() -> None:
                    while len(asking) <= fleet.capacity:
                        task = group.create_task(load._ask(asking))
                        asking.add(task)

                fleet.on_room(grow)
                grow()
                yield load
                fleet.on_room(lambda: None)
                for task in asking:
                    task.cancel()

    async def _ask(self, asking: "set[asyncio.Task[None]]") -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            while len(asking) <= self.fleet.capacity + 1:
                answer = await self.fleet.complete(QUESTION, [])
                self.answers += 1
                self.servers[answer.server] += 1
                self.most_asked = max(self.most_asked, len(asking))
        finally:
            asking.discard(task)


def test_runs_get_places_by_weight_and_priority() -> None:
    """Over time, and at each moment within a place or so; together they use all places."""
    shared = Shared()

    async def test(servers: Servers) -> None:
        async with (
            Load.on(servers) as one,
            Load.on(servers, weight=3) as three,
            Load.on(servers, weight=0.5, priority="high") as high,
        ):
            loads = (one, three, high)
            await asyncio.sleep(2.5)  # servers have answered, and the first requests, too
            before = [load.answers for load in loads]
            await asyncio.sleep(100)
            now = [sum(load.fleet.in_flight.values()) for load in loads]
            assert [3, 9, 12] == [pytest.approx(places, abs=1.5) for places in now]
            got = [load.answers - was for load, was in zip(loads, before, strict=True)]
            assert sum(got) > 2_300
            counted = [sum(server["completions"] for server in load.fleet.metrics()) for load in loads]
            assert [load.answers for load in loads] == counted
            parts = [24 * number / sum(got) for number in got]
            assert [3, 9, 12] == [pytest.approx(part, abs=0.25) for part in parts]
            assert 24 == sum(described["in_flight"] for described in servers.describe())

    shared.run(test, *URLS)


def test_a_run_alone_has_all_and_gives_up_what_is_not_its_own() -> None:
    """When a second run comes, when it goes, and while it has nothing to ask."""
    shared = Shared()

    async def test(servers: Servers) -> None:
        async with Load.on(servers) as first:
            await asyncio.sleep(3.2)
            assert 24 == sum(first.fleet.in_flight.values())
            async with Load.on(servers) as second:
                await asyncio.sleep(3.2)
                halves = [sum(load.fleet.in_flight.values()) for load in (first, second)]
                assert 24 == sum(halves)
                assert [12, 12] == [pytest.approx(half, abs=1) for half in halves]
                waiting = sum(described["queued"] for described in servers.describe())
                assert waiting <= 4
            async with servers.fleet(FleetSection()) as idle:
                await idle.ask_models()
                await asyncio.sleep(3.2)
                assert 24 == sum(first.fleet.in_flight.values())

    shared.run(test, *URLS)


def test_servers_come_and_go_while_requests_run() -> None:
    """No server at the start, three, one drained, one removed: no request fails."""
    shared = Shared()

    async def test(servers: Servers) -> None:
        async with servers.fleet(FleetSection()) as fleet, asyncio.TaskGroup() as group:
            asked = group.create_task(_ask_when_known(fleet))
            await asyncio.sleep(20)  # longer than give_up_s
            assert not asked.done()
            assert 0 == fleet.capacity == servers.usable
            assert URLS[0] == await servers.add(f"{URLS[0]}/v1/")
            await asked
            async with Load.on(servers) as load:
                await servers.add(URLS[1])
                await servers.add(URLS[2])
                await asyncio.sleep(5.3)
                assert {8} == {described["in_flight"] for described in servers.describe()}
                await servers.drain(URLS[1])
                await servers.remove(URLS[2])
                states = {described["server"]: described["state"] for described in servers.describe()}
                assert {URLS[0]: "usable", URLS[1]: "draining", URLS[2]: "removing"} == states
                await asyncio.sleep(3)
                counts = dict(load.servers)
                assert [URLS[0], URLS[1]] == [described["server"] for described in servers.describe()]
                await servers.add(URLS[1])  # used again
                await asyncio.sleep(3)
                assert load.servers[URLS[1]] > counts[URLS[1]]
                assert load.servers[URLS[2]] == counts[URLS[2]]
            with pytest.raises(KeyError):
                await servers.remove("http://unknown:1")
            with pytest.raises(ConfigError, match="not a valid URL"):
                await servers.add("nonsense")

    shared.run(test)


async def _ask_when_known(fleet: Fleet) -> None:
    await fleet.ask_models()
    await fleet.complete(QUESTION, [])


def test_an_outage_ends_no_run() -> None:
    """Requests wait for as long as no server can be used, and are answered afterwards."""
    shared = Shared()

    async def test(servers: Servers) -> None:
        async with servers.fleet(FleetSection(give_up_s=5)) as fleet, asyncio.TaskGroup() as group:
            await fleet.ask_models()
            shared.simulations[URLS[0]].go_down()
            asked = group.create_task(fleet.complete(QUESTION, []))
            await asyncio.sleep(60)
            assert not asked.done()
            assert fleet.gives_up_in_s is None
            assert 0 == servers.usable
            shared.simulations[URLS[0]].come_up()

    shared.run(test, URLS[0])


def test_a_drain_is_that_of_one_run() -> None:
    """Its waiting requests fail; those of the other run are answered."""
    shared = Shared(places=1)

    async def test(servers: Servers) -> None:
        async with servers.fleet(FleetSection()) as one, servers.fleet(FleetSection()) as other:
            await one.ask_models()
            await other.ask_models()
            async with AsyncExitStack() as stack:
                group = await stack.enter_async_context(asyncio.TaskGroup())
                first = group.create_task(one.complete(QUESTION, []))
                stopped = group.create_task(_is_stopped(one))
                asked = group.create_task(other.complete(QUESTION, []))
                await asyncio.sleep(0.1)
                one.drain()
                await asyncio.sleep(0)
                assert stopped.done()
                assert not first.done()
            assert stopped.result()
            assert first.result().text
            assert asked.result().text

    shared.run(test, URLS[0])


async def _is_stopped(fleet: Fleet) -> bool:
    try:
        await fleet.complete(QUESTION, [])
    except StoppedEarly:
        return True
    return False


def test_each_run_has_its_model() -> None:
    """Each server is used for the runs that want what it serves; a model that nobody serves is a mistake."""
    shared = Shared("small", "large", "large")

    async def test(servers: Servers) -> None:
        async with Load.on(servers, model="small") as small, Load.on(servers, model="large") as large:
            await asyncio.sleep(5)
            assert {URLS[0]} == set(small.servers)
            assert {URLS[1], URLS[2]} == set(large.servers)
        async with servers.fleet(FleetSection(model="huge")) as fleet:
            with pytest.raises(
                ConfigError, match=r"fleet.model: no server serves huge; they serve large, small"
            ):
                await fleet.ask_models()
        async with servers.fleet(FleetSection()) as fleet:
            with pytest.raises(ConfigError, match=r"different models.*Set fleet.model"):
                await fleet.ask_models()

    shared.run(test, *URLS)


def test_edits() -> None:
    """Servers that were added, removed and drained beside those that are named elsewhere."""
    named = [ServerSpec(URLS[0]), ServerSpec(URLS[1])]
    edits = ServerEdits()
    edits.add(ServerSpec(URLS[2], weight=2.0))
    edits.draining.add(URLS[0])
    edits.remove(URLS[1])
    assert [ServerSpec(URLS[0], draining=True), ServerSpec(URLS[2], weight=2.0)] == edits.apply(named)
    edits.add(ServerSpec(URLS[1]))
    edits.remove(URLS[2])
    assert [ServerSpec(URLS[0], draining=True), ServerSpec(URLS[1])] == edits.apply(named)


def test_a_run_that_is_cancelled_leaves_its_places_to_the_others() -> None:
    """Its requests are aborted at the servers; the other run, which waited, has all places at once."""
    shared = Shared(places=4)

    async def test(servers: Servers) -> None:
        async with Load.on(servers) as staying:
            async with Load.on(servers):
                await asyncio.sleep(3.3)
                assert 2 == sum(staying.fleet.in_flight.values())
            await asyncio.sleep(0.3)
            assert 4 == sum(staying.fleet.in_flight.values())
            assert 2 == shared.simulations[URLS[0]].stats.by_route["/abort_request"]
            assert 4 == shared.simulations[URLS[0]].stats.in_flight

    shared.run(test, URLS[0])
