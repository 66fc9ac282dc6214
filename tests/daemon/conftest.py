"""A real daemon on a loopback port, over a simulated server in this process."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
import pytest_asyncio

from streamsyn.config.loading import load
from streamsyn.daemon.daemon import Daemon, open_daemon
from streamsyn.daemon.hosted_run import HostedRun
from streamsyn.daemon.serve import bound, listening
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.telemetry import configure_logs

SERVER = "http://gpu-1:30000"
QUICK: dict[str, Any] = {
    "serve.listen": "127.0.0.1:0",
    "serve.min_free_bytes": 0,
    "fleet.servers": [SERVER],
    "fleet.backoff_base_s": 0.005,
    "sink.sync_interval_s": 0.01,
    "assembly.contexts_per_sample": 2,
    "run.drain_timeout_s": 5.0,
}


@pytest.fixture(autouse=True)
def _logs() -> None:
    """As the command logs: structlog's defaults read the disk to show a traceback."""
    configure_logs(as_json=False)


@dataclass(slots=True)
class Served:
    """A daemon and a client of it.

    Attributes:
        url: Where it listens.
        session: A client; paths such as "/v1/runs" suffice.
        daemon: The daemon.
        simulation: Its server.
    """

    url: str
    session: aiohttp.ClientSession
    daemon: Daemon
    simulation: Simulation

    async def new_run(self, run_id: str | None = None, **body: Any) -> dict[str, Any]:
        """Create a run and return it."""
        named = {} if run_id is None else {"id": run_id}
        return await self.ask("POST", "/v1/runs", {**named, **body})

    async def ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Send a request that must succeed; returns the JSON of the answer."""
        async with self.session.request(method, path, json=body) as answer:
            content: dict[str, Any] = await answer.json() if answer.status != 204 else {}
            assert answer.ok, content
            return content

    async def refused(self, method: str, path: str, body: Any = None, **given: Any) -> dict[str, Any]:
        """Send a request that must fail; returns the problem."""
        async with self.session.request(method, path, json=body, **given) as answer:
            content: dict[str, Any] = await answer.json(content_type=None)
            assert not answer.ok
            return content

    async def submit(self, run_id: str, seeds: int, first: int = 0) -> int:
        """Put seeds into a run's inbox, past HTTP; returns the number of accepted ones."""
        inbox = await (await self.daemon.runs.get(run_id)).inbox()
        return (await asyncio.to_thread(inbox.submit, seed_lines(seeds, first))).accepted

    async def until(self, run_id: str, holds: Callable[[HostedRun], bool]) -> HostedRun:
        """Wait until something holds for a run."""
        run = await self.daemon.runs.get(run_id)
        async with asyncio.timeout(20):
            while not holds(run):
                await run.changed()
        return run

    async def until_state(self, run_id: str, state: str) -> dict[str, Any]:
        """Wait until a run has a state and is not executed any more, and return it."""
        is_going = state == "running"
        run = await self.until(run_id, lambda run: run.state == state and run.is_executed == is_going)
        return run.as_json()


def seed_lines(number: int, first: int = 0) -> list[bytes]:
    """Lines of seeds."""
    return [
        orjson.dumps({"id": f"s{n}", "task": "qa", "instruction": f"What of {n}?", "answer": f"It is {n}."})
        for n in range(first, first + number)
    ]


StartDaemon = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture
def start_daemon(tmp_path: Path) -> StartDaemon:
    """Starts a daemon over tmp_path/"root", or over what an earlier one left there.

    Arguments are keys of the configuration, and `simulator` for the settings of its server.
    """

    @asynccontextmanager
    async def start(
        keys: dict[str, Any] | None = None,
        *,
        simulator: SimulatorConfig | None = None,
        headers: dict[str, str] | None = None,
    ) -> AsyncIterator[Served]:
        simulation = Simulation(simulator or SimulatorConfig())
        servers = InProcessServers({SERVER: simulation})
        config = load(None, (QUICK | (keys or {})).items())
        async with (
            open_daemon(tmp_path / "root", config, {}, servers.connect) as daemon,
            listening(daemon, await asyncio.to_thread(bound, config.serve)) as url,
            aiohttp.ClientSession(url, headers=headers) as session,
        ):
            yield Served(url, session, daemon, simulation)

    return start


@pytest_asyncio.fixture
async def daemon(start_daemon: StartDaemon) -> AsyncIterator[Served]:
    """A daemon with the defaults, and a client of it."""
    async with start_daemon() as served:
        yield served
