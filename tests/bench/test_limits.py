"""The verdict: real runs with each limit made to bind in turn, and measurements made by hand."""

import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.assembly.assembler import Arrangement, Assembler
from streamsyn.assembly.window import Passage
from streamsyn.bench.figures import figures
from streamsyn.bench.limits import Verdict, verdict
from streamsyn.bench.measured_run import RunToMeasure, measure
from streamsyn.bench.measurement import Load, Measurement, ServerCounters
from streamsyn.config.loading import load
from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.fleet.transport import Reply, Transport
from streamsyn.simulator.in_process import InProcessServers, InProcessTransport
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.simulator.timeline import Event, Timeline
from tests.bench.measured import SERVERS, measurement, request, steady_requests, tick
from tests.examples import examples
from tests.library.conftest import serving

URLS = ("http://gpu-0:30000", "http://gpu-1:30000")
VIRTUAL: Any = {"warmup_s": 3.0, "duration_s": 6.0}
REAL: Any = {"warmup_s": 0.2, "duration_s": 0.8}


def seeds_file(folder: Path, words: int) -> Path:
    """Write 200 seeds with long instructions."""
    path = folder / "seeds.jsonl"
    rows = [
        {
            "instruction": f"Who kept lighthouse {number}? " + f"It is number {number}. " * (words // 4),
            "answer": f"Keeper {number * 7919}.",
        }
        for number in range(200)
    ]
    path.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    return path


def measured(folder: Path, servers: Any, asked: Load, *, words: int = 10, **settings: Any) -> Measurement:
    """Measure; `servers` are URLs, or make simulated servers in this process."""
    urls = list(URLS) if callable(servers) else servers
    overrides: dict[str, Any] = {
        "recipe.target_words": 60,
        "recipe.max_tokens": 120,
        "checks.min_words": 5,
        "assembly.write": False,
        "fleet.servers": urls,
        "seeds.sources": [{"path": str(seeds_file(folder, words))}],
        **settings,
    }
    return measure(
        RunToMeasure(
            config=load(None, list(overrides.items())),
            load=asked,
            folder=folder,
            simulated=servers if callable(servers) else None,
            handles_signals=False,
        )
    )


def judged(found: Measurement) -> Verdict:
    """The verdict on a run."""
    return verdict(found, figures(found))


def simulated(
    timelines: Mapping[str, Timeline] | None = None, **config: Any
) -> Callable[[], InProcessServers]:
    """Simulated H100s with 8 seats."""
    settings = SimulatorConfig(**{"cost_model": "h100", "words": 60, "slots": 8, **config})
    return lambda: InProcessServers({url: Simulation(settings) for url in URLS}, timelines or {})


def test_servers_with_a_queue_are_the_limit(tmp_path: Path) -> None:
    """The adaptive cap keeps a queue behind full batches: `server_bound`."""
    run = measured(tmp_path, simulated(), Load(**VIRTUAL))
    parts, found = figures(run).seconds_per_request, judged(run)

    assert parts.network is not None
    assert parts.network < 0.1 * parts.server, "in one process there is none"
    assert "server_bound" == found.limit
    assert ["server_bound"] == [warning.code for warning in found.warnings]


@pytest.mark.parametrize("asked", [Load(cap=2, **VIRTUAL), Load(rate=2.0, **VIRTUAL)], ids=["cap", "rate"])
def test_servers_with_room_lack_work(tmp_path: Path, asked: Load) -> None:
    """A cap or a rate below what the servers can do: `queue_starved`, and the note names which to raise."""
    found = judged(measured(tmp_path, simulated(), asked))

    assert "queue_starved" == found.limit
    assert f"Raise --{'rate' if asked.rate else 'cap'}, which was 2" in found.warnings[0].note


def test_a_full_kv_pool_is_the_limit(tmp_path: Path) -> None:
    """Requests wait though the batch has seats: `kv_pressure` comes before `server_bound`."""
    servers = simulated(slots=None, cache_tokens=3000)
    found = judged(measured(tmp_path, servers, Load(cap=60, **VIRTUAL)))

    assert "kv_pressure" == found.limit
    assert ["kv_pressure", "server_bound"] == [warning.code for warning in found.warnings]


class Router:
    """One address that sends requests to servers in turn, whatever their caches hold."""

    def __init__(self, transports: Sequence[Transport]) -> None:
        self._transports = transports
        self._turns = itertools.cycle(transports)

    async def exchange(self, method: str, path: str, **more: Any) -> Reply:
        """See Transport; what is no completion goes to the first server."""
        transport = next(self._turns) if "completions" in path else self._transports[0]
        return await transport.exchange(method, path, **more)


class Sprayed(InProcessServers):
    """Simulated servers behind a router."""

    @asynccontextmanager
    async def connect(self, spec: ServerSpec) -> AsyncIterator[Transport]:
        """See InProcessServers."""
        yield Router([InProcessTransport(server, spec.url) for server in self.simulations.values()])


def test_prefixes_that_a_router_scatters_are_lost(tmp_path: Path) -> None:
    """Drafts of a seed share its prompt, but meet a different server each time: `prefix_lost`."""
    config = SimulatorConfig(cost_model="h100", words=60, slots=4)
    servers = lambda: Sprayed({f"http://{number}:1": Simulation(config) for number in range(4)})  # noqa: E731
    settings = {
        "fleet.servers": ["http://router:1"],
        "recipe.contexts_per_seed": 8,
    }
    found = judged(measured(tmp_path, servers, Load(cap=24, **VIRTUAL), words=1500, **settings))

    assert "prefix_lost" == found.limit
    assert 0.3 < found.warnings[0].observed < 0.7


def test_a_server_that_comes_and_goes_makes_a_run_unsteady(tmp_path: Path) -> None:
    """A server is down for 2 of each 4 s: `unsteady`, and the note names it."""
    flapping = {URLS[1]: Timeline([Event(3.5, every_s=4.0, down_s=2.0)])}
    found = judged(measured(tmp_path, simulated(flapping), Load(**VIRTUAL)))

    assert "unsteady" == found.limit
    assert URLS[1] in found.warnings[0].note
    assert URLS[0] not in found.warnings[0].note


def test_checks_that_keep_the_cpu_busy_bind_the_client(tmp_path: Path) -> None:
    """The servers have room, while the event loop is in the recipe: `client_bound`."""
    with serving(words=60, latency_ms=20.0, slots=64) as server:
        recipe: Any = {"recipe.use": "tests.bench.busy_recipe:BusyRecipe"}
        found = judged(measured(tmp_path, [server.url], Load(cap=8, **REAL), **recipe))

    assert "client_bound" == found.limit
    assert "queue_starved" not in {warning.code for warning in found.warnings}


LOGGED: Any = {"run.queue_size": 4, "sink.sync_rows": 4, "sink.sync_interval_s": 0.05}


def test_a_slow_disk_is_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fsync takes 0.3 s, longer than a busy machine takes for the rest: outcomes wait, no draft begins,
    and the disk is at work: `disk_bound`.
    """
    fsync = os.fsync

    def slow(fd: int) -> None:
        time.sleep(0.3)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", slow)
    with serving(words=60, latency_ms=20.0, slots=64) as server:
        found = judged(measured(tmp_path, [server.url], Load(cap=8, with_log=True, **REAL), **LOGGED))

    assert "disk_bound" == found.limit


def test_slow_assembly_is_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each context takes assembly 50 ms: outcomes wait while the disk is idle: `reader_bound`."""
    add = Assembler.add

    def slow(assembler: Assembler, passage: Passage) -> list[Arrangement]:
        time.sleep(0.05)
        return add(assembler, passage)

    monkeypatch.setattr(Assembler, "add", slow)
    with serving(words=60, latency_ms=20.0, slots=64) as server:
        settings = {**LOGGED, "assembly.write": True, "assembly.contexts_per_sample": 2}
        found = judged(measured(tmp_path, [server.url], Load(cap=8, with_log=True, **REAL), **settings))

    assert "reader_bound" == found.limit


WITHOUT_LOADS = {"running": None, "waiting": None, "token_usage": None}
SEATS = {"running": 8, "max_running": 8, "waiting": 0}


@pytest.mark.parametrize(
    ("asked", "server", "client", "limit"),
    [
        (Load(), {}, {}, "server_bound"),
        (Load(), SEATS, {}, "server_bound"),
        (Load(), {"waiting": 0}, {}, "queue_starved"),
        (Load(), {"waiting": 0, "token_usage": 0.95}, {}, "kv_pressure"),
        (Load(), {"waiting": 0, "decision": "kv_pool"}, {}, "kv_pressure"),
        (Load(), {"waiting": 0, "decision": "kv_pool", "in_flight": 4}, {}, "queue_starved"),
        (Load(), {"waiting": 3, "max_running": 256}, {}, "kv_pressure"),
        (Load(), {"waiting": 3, "max_running": 256, "waiting_uncached_tokens": 90_000}, {}, "server_bound"),
        (Load(), WITHOUT_LOADS, {}, "server_bound"),
        (Load(cap=8), WITHOUT_LOADS, {}, None),
        (Load(), {"waiting": 0}, {"loop_lag_s": 0.5}, "client_bound"),
        (Load(), {}, {"loop_lag_s": 0.5}, "server_bound"),
        (Load(), {"waiting": 0}, {"rows_waiting": 100}, "reader_bound"),
        (Load(), {"ejected": True}, {}, "unsteady"),
    ],
)
def test_what_ticks_show(
    asked: Load, server: dict[str, Any], client: dict[str, Any], limit: str | None
) -> None:
    """The main limit by what servers and client report, with and without load metrics."""
    ticks = [tick(float(at), server, **client) for at in range(1, 41)]

    assert limit == judged(measurement(ticks=ticks, load=asked)).limit


@pytest.mark.parametrize(("is_simulated", "limit"), [(True, "client_bound"), (False, "server_bound")])
def test_a_client_that_is_too_slow_for_a_simulated_fleet(is_simulated: bool, limit: str) -> None:
    """Simulated servers are busy however slow the client is; real ones are not, if it is too slow."""
    ticks = [tick(float(at), client_cpu_s=1.5 * at) for at in range(1, 41)]

    assert limit == judged(measurement(ticks=ticks, is_simulated=is_simulated)).limit


def test_retractions_are_pressure_on_the_pool() -> None:
    """Whatever its usage: what was retracted is computed again."""
    total = "sglang:num_retracted_requests_total"
    counters = [
        ServerCounters(server=server, at=at, values={total: retracted})
        for server in SERVERS
        for at, retracted in ((10.0, 5.0), (30.0, 7.0))
    ]
    found = judged(measurement(server_counters=counters))

    assert "kv_pressure" == found.limit
    assert pytest.approx(0.2) == found.warnings[0].observed
    assert ("retractions per answer", 20) == (found.warnings[0].unit, found.warnings[0].sample_count)


def test_requests_that_fail_are_named_with_their_server() -> None:
    """A server that refuses everything is no limit of a fleet, but a mistake; full queues are neither."""
    refused = {"ended": "error", "error": "RequestRefused", "error_message": "answered 400: too long"}
    requests = steady_requests()
    for one in requests[1::4]:
        for name, value in refused.items():
            setattr(one, name, value)
    for one in requests[::4]:
        one.ended, one.error = "error", "ServerBusy"
    found = judged(measurement(requests))

    assert "unsteady" == found.limit
    assert f"{SERVERS[1]} (5); the first one with: answered 400: too long" in found.warnings[0].note
    assert pytest.approx(1 / 3) == found.warnings[0].observed


def test_tokens_that_come_in_bursts_are_unsteady() -> None:
    """Where nothing else is the limit, a run that stops and goes is said to be unsteady."""
    requests = [request(0, 10.0, 12.0), request(1, 24.0, 26.0)]
    ticks = [tick(float(at), WITHOUT_LOADS) for at in range(1, 41)]

    assert "unsteady" == judged(measurement(requests, ticks, load=Load(cap=8))).limit


states = st.fixed_dictionaries(
    {
        "in_flight": st.integers(0, 20),
        "cap": st.integers(1, 20),
        "running": st.none() | st.integers(0, 20),
        "max_running": st.none() | st.integers(1, 20),
        "waiting": st.none() | st.integers(0, 20),
        "token_usage": st.none() | st.floats(0, 1),
        "ejected": st.booleans(),
        "decision": st.sampled_from(["", "kv_pool", "ramp"]),
    }
)
clients = st.fixed_dictionaries(
    {
        "loop_lag_s": st.none() | st.floats(0, 1),
        "rows_waiting": st.integers(0, 120),
        "rows_waiting_limit": st.sampled_from([0, 100]),
    }
)
loads = st.sampled_from([Load(), Load(cap=4), Load(rate=1.0)])


@examples(200)
@given(st.lists(st.tuples(states, clients), max_size=12), loads, st.booleans())
def test_at_most_one_limit_is_the_main_one(
    seen: list[tuple[dict[str, Any], dict[str, Any]]], asked: Load, is_simulated: bool
) -> None:
    """Whatever was seen: each code once, the main limit first, and a note with each warning."""
    ticks = [tick(10.0 + 2 * at, server, **client) for at, (server, client) in enumerate(seen)]

    found = judged(measurement(ticks=ticks, load=asked, is_simulated=is_simulated))
    codes = [warning.code for warning in found.warnings]

    assert len(set(codes)) == len(codes)
    assert found.limit is None or found.limit == codes[0]
    assert found.headline
    assert all(warning.note.endswith(".") and warning.sample_count > 0 for warning in found.warnings)
