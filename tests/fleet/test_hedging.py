"""Hedged requests: at the end of a run stragglers are asked again elsewhere, and the first answer counts."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from streamsyn.config.sections import FleetSection
from streamsyn.errors import ServerUnavailable
from streamsyn.fleet.fleet import Fleet, open_fleet
from streamsyn.records import Attempt, Request
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import Fault, Script, SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.simulator.virtual_time import run_virtually
from tests.fleet.test_fleet import ask_many, fleet_of, simulators, until

REQUEST = Request([{"role": "user", "content": "About geese."}], {})
URLS = ("http://first:1", "http://second:1")


def always_cut(*_: object) -> Fault:
    """A script: the server fails when its answer is due."""
    return Fault.CUT_BODY


@pytest.mark.usefixtures("no_task_left")
async def test_a_straggler_at_the_end_is_asked_again_elsewhere() -> None:
    """The first answer counts; the slower try is aborted, which is not a failure of its server."""
    async with simulators() as simulated:
        stuck = await simulated.start(lambda number, _: Fault.STALL if number == 3 else None)
        other = await simulated.start()
        async with fleet_of(stuck.url, other.url, concurrency=4) as fleet:
            await ask_many(fleet, 4)
            async with asyncio.TaskGroup() as group:
                asking = group.create_task(ask_many(fleet, 2))
                await until(lambda: stuck.simulation.stats.in_flight == 1 and other.simulation.stats.answered)
                fleet.tail(1, 30)
            servers = [answer.server for answer in asking.result()]
            await until(lambda: stuck.simulation.stats.in_flight == 0)
            assert {stuck.url: 0, other.url: 0} == fleet.in_flight
    assert {other.url} == set(servers)
    assert 1 == stuck.simulation.stats.by_route["/abort_request"]


class Two:
    """A server whose usual answer takes 10 s, and one whose takes 8 s; both have answered once."""

    def __init__(self, *scripts: Script) -> None:
        self.servers = [
            Simulation(SimulatorConfig(latency_ms=latency_ms), script)
            for latency_ms, script in zip((10_000, 8_000), scripts, strict=True)
        ]

    @asynccontextmanager
    async def opened(self, **section: Any) -> AsyncIterator[Fleet]:
        """The fleet of both, ready; a request goes to the first one."""
        connect = InProcessServers(dict(zip(URLS, self.servers, strict=True))).connect
        settings = FleetSection(servers=URLS, max_attempts=1, **section)
        async with open_fleet(settings, lambda _: None, {}, connect, Random(0)) as fleet:
            await fleet.ask_models()
            yield fleet

    async def straggler(self, fleet: Fleet, attempts: list[Attempt]) -> float:
        """Ask the first server for something late, and hedge it; returns when there was an answer."""
        clock = asyncio.get_running_loop().time
        fleet._hedging._answers, fleet._hedging._total_s = 10, 40.0  # the average answer takes 4 s
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(fleet.complete(REQUEST, attempts))
            await asyncio.sleep(0)
            fleet.tail(1, 100)
        assert asking.done()
        return clock()


def test_a_first_server_that_fails_leaves_the_second_alone() -> None:
    """The request waits for the second answer, which is on its way; both tries are recorded."""

    async def main() -> None:
        two, attempts = Two(always_cut, ()), list[Attempt]()
        async with two.opened() as fleet:
            assert 12 < await two.straggler(fleet, attempts) < 14  # sent at 4.8 s
            assert [0, 0] == list(fleet.in_flight.values())
        first, second = two.servers
        assert [1, 1] == [first.stats.requests, second.stats.requests]
        assert 0 == second.stats.disconnected
        assert [(URLS[0], True), (URLS[1], False)] == [(one.server, bool(one.error)) for one in attempts]
        assert 10.0 == pytest.approx(attempts[0].seconds, abs=0.1)

    run_virtually(main())


def test_both_servers_fail() -> None:
    """The error is that of the first one."""

    async def main() -> None:
        two, attempts = Two(always_cut, always_cut), list[Attempt]()
        async with two.opened() as fleet:
            with pytest.RaisesGroup(pytest.RaisesExc(ServerUnavailable, match=URLS[0])):
                await two.straggler(fleet, attempts)
            assert [0, 0] == list(fleet.in_flight.values())
        assert [URLS[0]] == [one.server for one in attempts]

    run_virtually(main())


def test_a_second_server_that_fails_changes_nothing() -> None:
    """The first answer is waited for."""

    async def main() -> None:
        two, attempts = Two((), always_cut), list[Attempt]()
        two.servers[1].engine.speed = 4.0
        async with two.opened() as fleet:
            assert 10 <= await two.straggler(fleet, attempts) < 11
        assert [(URLS[0], None)] == [(one.server, one.error) for one in attempts]

    run_virtually(main())


@pytest.mark.parametrize("hedge_tail", [False, True])
def test_a_drain_or_the_setting_switches_it_off(*, hedge_tail: bool) -> None:
    """While a run drains, nothing new is sent."""

    async def main() -> None:
        two = Two((), ())
        async with two.opened(hedge_tail=hedge_tail) as fleet:
            if hedge_tail:
                asking = asyncio.create_task(fleet.complete(REQUEST, []))
                await asyncio.sleep(1)
                fleet.drain()
                fleet._hedging._answers, fleet._hedging._total_s = 10, 40.0
                fleet.tail(1, 100)
                await asking
            else:
                await two.straggler(fleet, [])
        assert [1, 0] == [server.stats.requests for server in two.servers]

    run_virtually(main())
