"""Servers in the client's process answer as over HTTP, and the same way each time."""

import asyncio
import dataclasses
import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import orjson
import pytest

from streamsyn.errors import ConfigError, ServerError, ServerTimeout, ServerUnavailable, ServerUnreachable
from streamsyn.fleet.client import ServerClient
from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.fleet.transport import Transport, http_transport
from streamsyn.records import Completion, Request
from streamsyn.simulator.app import running
from streamsyn.simulator.in_process import InProcessServers, InProcessTransport
from streamsyn.simulator.settings import Fault, Script, SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.simulator.timeline import Event, Timeline

pytestmark = pytest.mark.usefixtures("no_task_left")

Served = tuple[Transport, Simulation]


@asynccontextmanager
async def over_http(
    script: Script = (), headers: dict[str, str] | None = None, **fields: Any
) -> AsyncIterator[Served]:
    """A server behind a socket."""
    async with (
        running(SimulatorConfig(**fields), script=script) as server,
        http_transport(server.url, headers or {}) as transport,
    ):
        yield transport, server.simulation


@asynccontextmanager
async def in_process(
    script: Script = (), headers: dict[str, str] | None = None, **fields: Any
) -> AsyncIterator[Served]:
    """The same one without."""
    simulation = Simulation(SimulatorConfig(**fields), script)
    yield InProcessTransport(simulation, headers=headers or {}), simulation


WAYS = (over_http, in_process)
BOTH = pytest.mark.parametrize("served", WAYS)


def request_of(number: int, **sampling: Any) -> Request:
    """One of a few that share a beginning."""
    text = "All about geese and their journeys. " * 60 + str(number)
    return Request([{"role": "user", "content": text}], sampling)


async def outcome(asking: Awaitable[Completion]) -> Any:
    """What came of a request, as values that can be compared."""
    try:
        return dataclasses.asdict(await asking)
    except ServerError as error:
        return type(error).__name__, error.completion_tokens


async def story(served: Any, script: Sequence[Fault | None], *, stream: bool, **fields: Any) -> Any:
    """What a client sees and a server counts when the same things happen."""
    async with served(script, words=60, **fields) as (transport, simulation):
        began: list[int] = []
        seen = []
        for number, fault in enumerate([*script, None, None]):
            # Only what stalls is to time out, however busy this machine is.
            client = ServerClient("http://server", transport, 0.2 if fault is Fault.STALL else 30)
            on_data = (lambda number=number: began.append(number)) if stream else None
            seen.append(await outcome(client.chat(request_of(number), "m", f"rid-{number}", on_data)))
        stats = simulation.stats.as_dict()
    del stats["connections"]  # there are none within a process
    return seen, began, stats


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("fault", list(Fault))
async def test_faults_look_the_same(fault: Fault, stream: bool) -> None:
    """The same completions, errors, first bytes and counters, whatever goes wrong."""
    script = [None, fault, None, fault, fault]
    told = [await story(served, script, stream=stream) for served in WAYS]
    assert told[0] == told[1]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_mix_of_everything_looks_the_same(stream: bool) -> None:
    """A long sequence of faults, drawn at random, on one server."""
    script = Random(7).choices([None, *(fault for fault in Fault if fault is not Fault.STALL)], k=60)
    told = [await story(served, script, stream=stream) for served in WAYS]
    assert told[0] == told[1]


async def test_death_looks_the_same() -> None:
    """After `die_after` requests, connections are refused."""
    told = [await story(served, [None] * 4, stream=False, die_after=3) for served in WAYS]
    assert told[0] == told[1]
    assert ["ServerUnreachable"] * 3 == [error for error, _ in told[0][0][3:]]


ROUTES = [
    ("GET", "/health"),
    ("GET", "/v1/models"),
    ("GET", "/v1/loads"),
    ("GET", "/v1/loads?include=core"),
    ("GET", "/v1/loads?include=nonsense"),
    ("GET", "/server_info"),
    ("GET", "/simulator/stats"),
    ("GET", "/nothing"),
    ("GET", "/generate"),
    ("POST", "/abort_request"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/generate"),
    ("POST", "/tokenize"),
]
BODIES = [b"", b"[]", b'{"text": "a", "prompt": "a", "rid": "r", "messages": [{"role": "user"}]}']


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_routes_answer_the_same(method: str, path: str) -> None:
    """Status and shape of the body, with whatever body is sent; with a key or without."""

    async def told(served: Any, key: str | None) -> list[Any]:
        async with served(headers={"Authorization": f"Bearer {key}"} if key else {}, api_key="key") as (
            transport,
            _,
        ):
            replies = [await transport.exchange(method, path, body=body, timeout_s=5) for body in BODIES]
        return [(reply.status, shape(reply.body)) for reply in replies]

    for key in (None, "wrong", "key"):
        assert await told(over_http, key) == await told(in_process, key)


def shape(body: bytes) -> Any:
    """What of a body does not depend on the time."""

    def keys(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: keys(below) for key, below in value.items()}
        return [keys(below) for below in value] if isinstance(value, list) else type(value)

    try:
        return keys(orjson.loads(body))
    except orjson.JSONDecodeError:
        return body


@BOTH
async def test_a_key_is_asked_for(served: Any) -> None:
    """A missing or wrong key raises the same ConfigError."""
    async with served(api_key="secret") as (transport, _):
        with pytest.raises(ConfigError, match="does not accept the key"):
            await ServerClient("http://server", transport, 5).models()
    async with served(headers={"Authorization": "Bearer secret"}, api_key="secret") as (transport, _):
        assert ["simulated"] == await ServerClient("http://server", transport, 5).models()


async def running_at(simulation: Simulation, count: int) -> None:
    """Returns when so many requests run."""
    async with asyncio.timeout(5):
        while simulation.engine.running != count:  # noqa: ASYNC110 - sets no event
            await asyncio.sleep(0)


@BOTH
async def test_a_timeout_ends_the_work_as_a_disconnect_does(served: Any) -> None:
    """The server stops the request; nothing is left running."""
    async with served([Fault.STALL]) as (transport, simulation):
        with pytest.raises(ServerTimeout, match=r"within 1 s"):
            await ServerClient("http://server", transport, 1.0).chat(request_of(1), "m", "r")
        await running_at(simulation, 0)
        assert (0, 1) == (simulation.stats.in_flight, simulation.stats.disconnected)


@BOTH
async def test_an_abort_ends_the_request_of_that_rid(served: Any) -> None:
    """The other one goes on."""
    async with served([Fault.STALL] * 2) as (transport, simulation), asyncio.TaskGroup() as group:
        client = ServerClient("http://server", transport, 5)
        asked = [
            group.create_task(outcome(client.chat(request_of(number), "m", rid)))
            for number, rid in enumerate(("rid-1", "rid-2"))
        ]
        await running_at(simulation, 2)
        await client.abort("rid-1")
        assert "BrokenResponse" == (await asked[0])[0]
        assert simulation.engine.running == 1
        await client.abort("rid-2")


@BOTH
async def test_going_down_loses_what_runs(served: Any) -> None:
    """Requests in flight are lost, with a first byte or without; later ones are refused until it is up."""
    async with served([Fault.STALL], ms_per_token=100) as (transport, simulation):
        client = ServerClient("http://server", transport, 5)
        begun = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            stalled = group.create_task(outcome(client.chat(request_of(1), "m", "r-1")))
            await running_at(simulation, 1)
            streamed = group.create_task(outcome(client.chat(request_of(2), "m", "r-2", begun.set)))
            await begun.wait()
            simulation.go_down()
            with pytest.raises(ServerUnavailable):
                await client.load()
        assert ("ServerUnavailable", 0) == streamed.result()
        assert stalled.result()[0] in ("ServerUnavailable", "ServerUnreachable")
        assert (0, 0) == (simulation.engine.running, simulation.stats.in_flight)
        simulation.come_up()
        assert await client.load() is not None


async def test_a_fleet_connects_by_url() -> None:
    """Each URL leads to its server; any other URL refuses connections."""
    simulations = {f"http://s{n}": Simulation(SimulatorConfig(model=f"model-{n}")) for n in range(3)}
    servers = InProcessServers(simulations)
    for n, url in enumerate(simulations):
        async with servers.connect(ServerSpec(url)) as transport:
            assert [f"model-{n}"] == await ServerClient(url, transport, 5).models()
    async with servers.connect(ServerSpec("http://elsewhere")) as transport:
        with pytest.raises(ServerUnreachable, match="elsewhere"):
            await ServerClient("http://elsewhere", transport, 5).models()


def scenario(**fields: Any) -> list[tuple[float, int, Any]]:
    """64 servers that flap and fail; 600 requests come at random, and are tried until they are answered."""
    rng = Random(1)
    rates = {"http_500": 0.03, "reset": 0.03, "stall": 0.01, "cut_body": 0.02, "queue_full": 0.02}
    urls = [f"http://s{number}" for number in range(64)]
    simulations = {
        url: Simulation(SimulatorConfig(words=80, seed=number, faults=rates, **fields))
        for number, url in enumerate(urls)
    }
    flapping = {
        url: Timeline([Event(rng.uniform(1, 60), every_s=70, down_s=12), Event(20, speed=0.5)])
        for url in urls[::4]
    }
    servers = InProcessServers(simulations, flapping)
    seen: list[tuple[float, int, Any]] = []

    async def ask(number: int) -> None:
        await asyncio.sleep(rng.uniform(0, 120))
        for attempt in range(100):
            url = rng.choice(urls)
            async with servers.connect(ServerSpec(url)) as transport:
                client = ServerClient(url, transport, 30)
                told = await outcome(client.chat(request_of(number % 7), "m", f"r-{number:04}-{attempt:02}"))
            seen.append((asyncio.get_running_loop().time(), number, told))
            if isinstance(told, dict):
                return
            await asyncio.sleep(rng.expovariate(1))

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(600):
                group.create_task(ask(number))

    servers.run(everybody(), limit_s=3600)
    return seen


def digest() -> str:
    """The scenario in virtual time, with each kind of engine, in short."""
    plain: dict[str, Any] = {"latency_ms": 300, "jitter_ms": 100, "ms_per_token": 8}
    told = []
    for fields in (plain, {"cost_model": "h100", "queue_limit": 2}):
        seen = scenario(slots=4, **fields)
        failed = sum(not isinstance(told, dict) for _, _, told in seen)
        told.append(f"{failed} {seen[-1][0]!r} {hashlib.sha256(orjson.dumps(seen)).hexdigest()}")
    return ", ".join(told)


def test_the_same_happens_twice() -> None:
    """Two minutes of many servers are the same to the last bit, for any hash seed."""
    command = [sys.executable, "-c", "from tests.simulator.test_in_process import digest; print(digest())"]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    here = digest()
    assert here == done.stdout.strip()
    assert int(here.split()[0]) > 30
