"""Servers that are placed while they are used: what is not listed any more is dead."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from streamsyn.config.sections import FleetSection
from streamsyn.fleet.discovery import Demand
from streamsyn.fleet.fleet import Fleet, open_fleet
from streamsyn.fleet.server_spec import ServerSpec
from tests.fleet.test_fleet import ask_many, simulators, until


class Listed:
    """Lists what a test says is alive."""

    def __init__(self, *specs: ServerSpec) -> None:
        self.changed = asyncio.Event()
        self.demand: Callable[[], Demand]
        self._specs = list(specs)

    def specs(self) -> list[ServerSpec]:
        """See PlacedServers."""
        return self._specs

    def change(self, *specs: ServerSpec) -> None:
        """List these from now on."""
        self._specs = list(specs)
        self.changed.set()


@asynccontextmanager
async def fleet_on(listed: Listed) -> AsyncIterator[Fleet]:
    """A fleet of these servers alone; nothing but news of them makes it look again."""
    section = FleetSection(discover_interval_s=3600.0, max_in_flight=4, concurrency=4)
    async with open_fleet(section, pytest.fail, placed=listed) as fleet:
        await fleet.ask_models()
        yield fleet


@pytest.mark.usefixtures("no_task_left")
async def test_requests_at_a_dead_server_go_elsewhere_at_once() -> None:
    """Nothing waits for the time-out of a server that hangs, since it is known to be dead."""
    async with simulators() as simulated:
        hanging = await simulated.start(latency_ms=3_600_000)
        alive = await simulated.start()
        dead = ServerSpec(hanging.url, incarnation="a")
        listed = Listed(dead)
        async with fleet_on(listed) as fleet, asyncio.TaskGroup() as group:
            asking = group.create_task(ask_many(fleet, 3))
            await until(lambda: hanging.simulation.stats.in_flight == 3)
            listed.change(ServerSpec(alive.url, incarnation="b"))
            assert {alive.url} == {answer.server for answer in await asking}
            await until(lambda: [alive.url] == [server.url for server in fleet.servers])


@pytest.mark.usefixtures("no_task_left")
async def test_another_incarnation_is_a_new_server() -> None:
    """At the URL of a server that died there may soon be another, with nothing in its cache."""
    async with simulators() as simulated:
        server = await simulated.start()
        listed = Listed(ServerSpec(server.url, incarnation="a"))
        async with fleet_on(listed) as fleet:
            await ask_many(fleet, 4)
            before = fleet.servers[0]
            listed.change(ServerSpec(server.url, incarnation="b"))
            await until(lambda: fleet.servers[0] is not before and fleet.servers[0].is_usable)
            assert 0 == fleet.servers[0].completions
            await ask_many(fleet, 2)
            assert [6] == [figures["completions"] for figures in fleet.metrics()]


@pytest.mark.usefixtures("no_task_left")
async def test_who_places_servers_learns_what_there_is_to_do() -> None:
    """The requests in flight, and how many a server can have."""
    async with simulators() as simulated:
        server = await simulated.start(latency_ms=3_600_000)
        listed = Listed(ServerSpec(server.url, incarnation="a"))
        async with fleet_on(listed) as fleet, asyncio.TaskGroup() as group:
            asking = group.create_task(ask_many(fleet, 6))
            await until(lambda: server.simulation.stats.in_flight == 4)
            demand = listed.demand()
            asking.cancel()
    assert (4, {server.url: 4}) == (demand.room, demand.in_flight)
