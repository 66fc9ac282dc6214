"""Whole runs over one set of servers, in virtual time: shares, workers, and servers that are away."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from streamsyn.config.sections import FleetSection
from streamsyn.fleet.shared_servers import Servers, open_servers
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run_in_loop
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from tests.builders import rows
from tests.pipeline.test_run_in_loop import URL, Runs, ids

PLACES = 16


class SharedRuns(Runs):
    """Runs at one simulated server that they share."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.simulation = Simulation(SimulatorConfig(latency_ms=1_000))
        self.servers = InProcessServers({URL: self.simulation})

    def shared(self, name: str, seeds: int, **given: Any) -> RunRequest:
        """A request for a run at shared servers; its own configuration names one that does not exist."""
        request = self.request(name, seeds, **given)
        fleet = request.config.fleet.model_copy(update={"servers": ("http://nowhere:1",)})
        request.config = request.config.model_copy(update={"fleet": fleet})
        request.connect = None
        return request

    def opened(self, *urls: str) -> Any:
        """The servers."""
        section = FleetSection(servers=urls, concurrency=PLACES, give_up_s=5)
        return open_servers(section, {}, self.servers.connect)


def test_two_runs_finish_in_proportion_to_their_weights(tmp_path: Path) -> None:
    """Neither has more workers than it can use; when the first has finished, the other has all places."""
    runs = SharedRuns(tmp_path)
    ended: dict[str, float] = {}

    heavy, light = runs.shared("heavy", 240, weight=3.0), runs.shared("light", 240)

    async def one(request: RunRequest, servers: Servers) -> None:
        request.servers = servers
        await run_in_loop(request)
        ended[request.out.name] = asyncio.get_running_loop().time()

    async def main() -> None:
        async with runs.opened(URL) as servers, asyncio.TaskGroup() as group:
            for request in (heavy, light):
                group.create_task(one(request, servers))

    runs.servers.run(main(), limit_s=200)
    assert [[240, 240]] * 2 == [ids(tmp_path / f"out-{name}") for name in ("heavy", "light")]
    assert 240 / 12 == pytest.approx(ended["out-heavy"], rel=0.15)
    assert 480 / 16 == pytest.approx(ended["out-light"], rel=0.15)
    assert runs.simulation.stats.max_in_flight == PLACES


def test_a_run_waits_for_its_first_server_and_survives_an_outage(tmp_path: Path) -> None:
    """Longer than `fleet.give_up_s`, which ends a run that has its own servers."""
    runs = SharedRuns(tmp_path)
    request = runs.shared("a", 60)

    async def main() -> None:
        async with runs.opened() as request.servers, asyncio.TaskGroup() as group:
            servers = request.servers
            running = group.create_task(run_in_loop(request))
            await asyncio.sleep(30)
            await servers.add(URL)
            await asyncio.sleep(2)
            runs.simulation.go_down()
            await asyncio.sleep(60)
            assert not running.done()
            runs.simulation.come_up()
        assert running.result().stopped is None

    runs.servers.run(main(), limit_s=400)
    assert [60, 60] == ids(tmp_path / "out-a")
    assert [] == rows(tmp_path / "out-a", "rejects")
