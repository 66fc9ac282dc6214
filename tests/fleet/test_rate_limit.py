"""429 and `Retry-After`: who waits, for how long, and what it costs the others. In virtual time."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from random import Random
from typing import Any, TypeVar

import pytest
import structlog

from streamsyn.config.sections import FleetSection
from streamsyn.errors import RateLimited, StoppedEarly
from streamsyn.fleet.fleet import Fleet, open_fleet
from streamsyn.records import Attempt, Request
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.protocol import QUOTA
from streamsyn.simulator.settings import PAUSE_S, Fault, Script, SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.simulator.virtual_time import run_virtually

T = TypeVar("T")

LIMITED, USUAL = "limited", "usual"


def request(kind: str = USUAL, group: str = "") -> Request:
    """A request that `limits` knows by its kind."""
    return Request([{"role": "user", "content": kind}], {}, group=group)


def limits(fault: Fault) -> Script:
    """Requests of the kind `LIMITED` always meet this fault."""
    return lambda _, body: fault if body["messages"][0]["content"] == LIMITED else None


class Run:
    """A fleet of simulated servers, one for each script, and why it gave up, if it did."""

    def __init__(self, *scripts: Script, **section: Any) -> None:
        config = SimulatorConfig(slots=40, latency_ms=100, words=20)
        self.urls = [f"http://gpu-{number}:1" for number in range(len(scripts))]
        self.simulations = [Simulation(config, script) for script in scripts]
        self.section = FleetSection(servers=tuple(self.urls), **section)
        self.gone: asyncio.Future[tuple[float, str]] = asyncio.get_running_loop().create_future()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Fleet]:
        """The fleet, ready."""
        connect = InProcessServers(dict(zip(self.urls, self.simulations, strict=True))).connect
        async with open_fleet(self.section, self._give_up, {}, connect, Random(0)) as fleet:
            await fleet.ask_models()
            yield fleet

    def _give_up(self, why: str) -> None:
        self.gone.set_result((asyncio.get_running_loop().time(), why))


def virtually(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` in virtual time."""
    return run_virtually(main, limit_s=3600)


async def ask_usual(fleet: Fleet, number: int, workers: int = 60) -> float:
    """Ask for `number` usual answers, as the workers of a run do; returns the seconds until the last one."""
    clock = asyncio.get_running_loop().time
    started, numbers = clock(), iter(range(number))

    async def work() -> None:
        for _ in numbers:
            await fleet.complete(request(), [])

    async with asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(work())
    return clock() - started


@pytest.mark.parametrize("fault", [Fault.RATE_LIMIT, Fault.PAUSE])
def test_a_request_that_is_always_limited_costs_the_others_little(fault: Fault) -> None:
    """Three such requests leave the server's rate and cap as they are, and end after `give_up_s`."""

    async def measured(limited: int) -> tuple[float, int]:
        clock = asyncio.get_running_loop().time
        async with Run(limits(fault), give_up_s=60.0).opened() as fleet:
            await ask_usual(fleet, 400)  # until the cap has grown
            started = clock()
            refused = [asyncio.create_task(_refusal(fleet)) for _ in range(limited)]
            took, cap = await ask_usual(fleet, 1200), fleet.servers[0].cap
            while not all(one.done() for one in refused):
                await fleet.complete(request(), [])
            assert not refused or 60 <= clock() - started <= 60 + 30
            for one in refused:
                await one
        return took, cap

    alone_s, alone_cap = virtually(measured(0))
    beside_s, beside_cap = virtually(measured(3))
    pauses_s = 4 * PAUSE_S if fault is Fault.PAUSE else 0  # the server asks everyone to wait
    assert beside_s <= 1.02 * alone_s + pauses_s
    assert beside_cap >= alone_cap


async def _refusal(fleet: Fleet) -> None:
    attempts: list[Attempt] = []
    with pytest.raises(RateLimited, match=QUOTA) as raised:
        await fleet.complete(request(LIMITED), attempts)
    assert [f"RateLimited: {raised.value}"] == [attempt.error for attempt in attempts]


def first_of_all(fault: Fault) -> Script:
    """A script for several servers: the first request that any of them gets meets the fault."""
    seen: list[int] = []

    def script(number: int, _: dict[str, Any]) -> Fault | None:
        seen.append(number)
        return fault if len(seen) == 1 else None

    return script


@pytest.mark.parametrize("group", ["", "a group"])
def test_a_server_that_asks_for_a_pause_is_left_alone(group: str) -> None:
    """Until then nobody asks it, and all requests go to the other server, those of its groups included."""

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        script = first_of_all(Fault.PAUSE)
        run = Run(script, script)
        async with run.opened() as fleet:
            while clock() < PAUSE_S - 0.2:
                await fleet.complete(request(group=group), [])
            paused = next(simulation for simulation in run.simulations if simulation.stats.faults)
            other = next(simulation for simulation in run.simulations if not simulation.stats.faults)
            assert 1 == paused.stats.requests
            assert other.stats.requests > 20
            await asyncio.sleep(0.5)
            await ask_usual(fleet, 40)
            assert paused.stats.requests > 10

    virtually(main())


def test_the_pause_that_a_check_before_the_run_met_holds_for_the_run() -> None:
    """The first request of the run is sent when the pause has passed."""

    async def main() -> float:
        async with Run(first_of_all(Fault.PAUSE)).opened() as fleet:
            assert await fleet.check_accepted([request()], fleet.models[0]) is None
            await fleet.complete(request(), [])
        return asyncio.get_running_loop().time()

    assert PAUSE_S <= virtually(main()) < PAUSE_S + 1


def test_requests_that_wait_for_a_server_do_not_wait_for_its_pause() -> None:
    """When the server of a group asks for a long pause, its queue goes to the other server at once."""

    async def main() -> None:
        script = first_of_all(Fault.PAUSE)
        async with Run(script, script, concurrency=1).opened() as fleet, asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(fleet.complete(request(group="a group"), []))
        assert asyncio.get_running_loop().time() < PAUSE_S

    virtually(main())


def test_an_only_server_that_asks_for_a_pause_is_waited_for() -> None:
    """The request is sent again when the pause has passed; it costs no try."""

    async def main() -> float:
        attempts: list[Attempt] = []
        async with Run(first_of_all(Fault.PAUSE), max_attempts=1).opened() as fleet:
            await fleet.complete(request(), attempts)
        assert [None] == [attempt.error for attempt in attempts]
        return asyncio.get_running_loop().time()

    assert PAUSE_S <= virtually(main()) < PAUSE_S + 1


@pytest.mark.parametrize("fault", [Fault.RATE_LIMIT, Fault.PAUSE, Fault.QUEUE_FULL])
def test_a_fleet_that_refuses_everything_is_given_up(fault: Fault) -> None:
    """After `give_up_s` the run ends, and the reason quotes the servers; a warning comes every 5 minutes.

    Pauses that the servers ask for come on top, up to 10 minutes in all.
    """

    async def main() -> None:
        run = Run(lambda *_: fault, lambda *_: fault, give_up_s=30.0)
        async with run.opened() as fleet:
            asking = [asyncio.create_task(fleet.complete(request(), [])) for _ in range(20)]
            await asyncio.sleep(12)
            left_s = fleet.gives_up_in_s
            assert left_s is not None
            assert left_s <= 30
            at, why = await run.gone
            assert not any(one.done() for one in asking)
            for one in asking:
                one.cancel()
            await asyncio.wait(asking)
        assert (630 if fault is Fault.PAUSE else 30) <= at < 640
        assert at < 32 or fault is Fault.PAUSE
        assert "fleet.give_up_s = 30 s" in why
        assert ("queue is full" if fault is Fault.QUEUE_FULL else QUOTA) in why

    with structlog.testing.capture_logs() as logs:
        virtually(main())
    warnings = [log for log in logs if log["log_level"] == "warning"]
    assert {Fault.QUEUE_FULL: 0, Fault.RATE_LIMIT: 2, Fault.PAUSE: 6}[fault] == len(warnings)
    assert all(QUOTA in log["error"] for log in warnings)


def test_a_long_answer_is_waited_for_while_others_are_refused() -> None:
    """A request that was accepted may take longer than `give_up_s`; the fleet is not given up meanwhile."""

    async def main() -> None:
        run = Run(lambda number, _: None if number == 1 else Fault.RATE_LIMIT, give_up_s=30.0)
        run.simulations[0].engine.speed = 0.1 / 100  # the answer takes 100 s
        async with run.opened() as fleet:
            tasks = [asyncio.create_task(fleet.complete(request(), [])) for _ in range(4)]
            await tasks[0]
            assert not run.gone.done()
            assert asyncio.get_running_loop().time() > 90
            at, _ = await run.gone
            assert 130 <= at <= 140
            for one in tasks:
                one.cancel()
            await asyncio.wait(tasks)

    virtually(main())


def test_a_drain_does_not_wait_for_a_pause() -> None:
    """A request that no server has accepted is put down at once."""

    async def main() -> float:
        async with Run(
            lambda *_: Fault.RATE_LIMIT, backoff_base_s=600.0, backoff_max_s=600.0
        ).opened() as fleet:
            asking = asyncio.create_task(fleet.complete(request(), []))
            await asyncio.sleep(0.5)
            fleet.drain()
            with pytest.raises(StoppedEarly):
                await asking
            return asyncio.get_running_loop().time()

    assert virtually(main()) < 1
