"""A whole run in virtual time over servers that Ray would place: they die and come back as others."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest
from structlog.testing import capture_logs

from streamsyn.background import background
from streamsyn.config.command_sections import ClusterSection
from streamsyn.config.loading import load
from streamsyn.fleet.discovery import Demand
from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.fleet.transport import Reply, Transport
from streamsyn.pipeline import setup
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run
from streamsyn.simulator.in_process import InProcessTransport
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.simulator.virtual_time import run_virtually
from tests.builders import rows

KNOWN_AFTER_S = 2.5
"""From a death until Ray knows of it."""
STARTS_IN_S = 5.0


class Incarnation:
    """One process of a server."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        self.simulation = Simulation(SimulatorConfig(cost_model="h100", slots=32))
        self.is_listed = True
        self.cut_off = 0
        """Requests in flight at its death."""


class Cluster:
    """Servers that die at random moments; another process with the same URL comes later."""

    def __init__(self, servers: int, mean_life_s: float, rng: Random) -> None:
        self.changed = asyncio.Event()
        self.demand: Callable[[], Demand] = lambda: Demand(0, 1, {})
        self.all: list[Incarnation] = []
        self.asked_ghosts = 0
        self.sent = 0
        self._alive: dict[str, Incarnation] = {}
        self._mean_life_s = mean_life_s
        self._rng = rng
        for number in range(servers):
            self._place(f"http://gpu-{number}:30000")

    def specs(self) -> list[ServerSpec]:
        """See PlacedServers."""
        return [one.spec for one in self._alive.values()]

    @property
    def deaths(self) -> int:
        return sum(not one.is_listed for one in self.all)

    @asynccontextmanager
    async def placed(self, _section: ClusterSection, **_: Any) -> AsyncIterator["Cluster"]:
        """Stands for `setup.on_cluster`."""
        async with background() as tasks:
            for url in list(self._alive):
                tasks.start(self._live_and_die(url), name=url)
            yield self

    @asynccontextmanager
    async def connect(self, spec: ServerSpec) -> AsyncIterator[Transport]:
        """Open a transport to a process; not to another one that has its URL later."""
        yield Counted(self, next(one for one in self.all if one.spec.incarnation == spec.incarnation))

    def _place(self, url: str) -> None:
        self._alive[url] = Incarnation(ServerSpec(url, incarnation=f"incarnation-{len(self.all)}"))
        self.all.append(self._alive[url])
        self.changed.set()

    async def _live_and_die(self, url: str) -> None:
        while True:
            await asyncio.sleep(self._rng.expovariate(1 / self._mean_life_s))
            dead = self._alive[url]
            dead.cut_off = dead.simulation.stats.in_flight
            dead.simulation.die()
            await asyncio.sleep(KNOWN_AFTER_S)
            del self._alive[url]
            dead.is_listed = False
            self.changed.set()
            await asyncio.sleep(STARTS_IN_S)
            self._place(url)


class Counted:
    """A transport to one process, which counts."""

    def __init__(self, cluster: Cluster, server: Incarnation) -> None:
        self._cluster, self._server = cluster, server
        self._transport = InProcessTransport(server.simulation, server.spec.url)

    async def exchange(self, method: str, path: str, **given: Any) -> Reply:
        self._cluster.sent += path.endswith("/completions")
        self._cluster.asked_ghosts += not self._server.is_listed and path.endswith("/completions")
        return await self._transport.exchange(method, path, **given)


@pytest.mark.parametrize(
    ("servers", "seeds", "mean_life_s"),
    [
        pytest.param(30, 600, 10.0, id="30 servers"),
        pytest.param(
            1000, 12_000, 30.0, id="1,000 servers", marks=[pytest.mark.torture, pytest.mark.timeout(900)]
        ),
    ],
)
def test_servers_die_and_come_back(
    servers: int, seeds: int, mean_life_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each seed has one outcome, no dead process is asked, and what is repeated was in flight at a death."""
    path = tmp_path / "seeds.jsonl"
    path.write_bytes(
        b"".join(
            orjson.dumps({"instruction": f"Who is {n}?", "answer": f"It is {n}."}) + b"\n"
            for n in range(seeds)
        )
    )
    ended = list[float]()
    cluster = Cluster(servers, mean_life_s, Random(0))
    monkeypatch.setattr(setup, "on_cluster", cluster.placed)

    async def timed(main: Coroutine[Any, Any, None]) -> None:
        await main
        ended.append(asyncio.get_running_loop().time())

    settings: list[tuple[str, Any]] = [
        ("seeds.sources", [{"path": str(path)}]),
        ("cluster", {"address": "virtual", "model": "simulated"}),
        ("assembly.write", False),
        ("fleet.concurrency", 4),
        ("fleet.max_attempts", 100),
    ]
    began = time.perf_counter()
    with capture_logs():
        summary = run(
            RunRequest(
                config=load(None, settings),
                out=tmp_path / "out",
                connect=cluster.connect,
                runner=lambda main: run_virtually(timed(main)),
                rng=Random(0),
                show_progress=False,
                preflight=False,
            )
        )
    real_s = time.perf_counter() - began
    found = rows(tmp_path / "out", "contexts")
    assert (seeds, 0, None) == (summary.contexts, summary.rejects, summary.stopped)
    assert {1} == set(Counter(row["seed_id"] for row in found).values())
    assert cluster.deaths > 20
    assert 0 == cluster.asked_ghosts
    asked = sum(one.simulation.stats.requests for one in cluster.all)
    cut_off = sum(one.cut_off for one in cluster.all)
    assert seeds <= asked <= seeds + cut_off
    print(
        f"\n{servers} servers, {seeds} seeds, {cluster.deaths} deaths in {ended[0]:.0f} virtual seconds "
        f"({real_s:.0f} s): {asked - seeds} requests repeated, {cut_off} were in flight at deaths, "
        f"{cluster.sent - asked} refused"
    )
