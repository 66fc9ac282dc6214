"""Timelines: their order, and their effect on servers over HTTP and in the process."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from streamsyn.cli.simulate import simulate
from streamsyn.errors import ConfigError, ServerError, ServerUnavailable, ServerUnreachable, root_cause
from streamsyn.fleet.client import ServerClient
from streamsyn.fleet.transport import http_transport
from streamsyn.records import Request
from streamsyn.simulator.app import running
from streamsyn.simulator.in_process import InProcessTransport
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.simulator.timeline import Change, Event, Timeline, load_timeline, playing
from streamsyn.simulator.virtual_time import run_virtually

REQUEST = Request([{"role": "user", "content": "About geese. " * 100}], {})
WHOLE = """
[[event]]
at_s = 60
speed = 0.5
[[event]]
at_s = 120
down_s = 30
[[event]]
at_s = 200
every_s = 90
down_s = 10
[[event]]
at_s = 300
faults = {http_500 = 0.1, queue_full = 0.05}
[[event]]
at_s = 600
die = true
"""


def written(tmp_path: Path, text: str) -> Path:
    """A file with `text`."""
    path = tmp_path / "timeline.toml"
    path.write_text(text, "utf-8")
    return path


def test_a_file_becomes_a_schedule(tmp_path: Path) -> None:
    """Events in order of time, repeated ones as often as they come, until death."""
    rates = {"http_500": 0.1, "queue_full": 0.05}
    flapping = [
        change
        for start in (200, 290, 380, 470, 560)
        for change in (Change(start, down=True), Change(start + 10, down=False))
    ]
    flapping.insert(3, Change(300, faults=rates))
    assert [
        Change(60, speed=0.5),
        Change(120, down=True),
        Change(150, down=False),
        *flapping,
        Change(600, die=True),
    ] == list(load_timeline(written(tmp_path, WHOLE)).changes())


def test_outages_that_touch_are_one() -> None:
    """Down at the first start, up at the last end."""
    timeline = Timeline([Event(10, down_s=10), Event(15, down_s=2), Event(20, down_s=5), Event(40, down_s=1)])
    told = [(change.at_s, change.down) for change in timeline.changes() if change.down is not None]
    assert [(10, True), (25, False), (40, True), (41, False)] == told


def test_repeated_events_never_end() -> None:
    """An endless schedule is generated lazily."""
    changes = islice(Timeline([Event(1, every_s=2, speed=0.5)]).changes(), 1000)
    assert [1 + 2 * n for n in range(1000)] == [change.at_s for change in changes]


def test_outages_may_never_end() -> None:
    """Two alternating outages can be one endless outage; the schedule continues and never blocks."""
    timeline = Timeline([Event(0, every_s=10, down_s=6), Event(5, every_s=10, down_s=6)])
    told = [change.down for change in islice(timeline.changes(), 100)]
    assert [True] == [down for down in told if down is not None]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("event = 3", "event must be a list of tables"),
        ("[[events]]\nat_s = 1", "unknown key events"),
        ("[[event]]\nspeed = 1", "event 1: at_s is missing"),
        ("[[event]]\nat_s = 1\nspeed = 1\n[[event]]\nat_s = 2", "event 2: the event has no effect"),
        ("[[event]]\nat_s = 1\ndown = 3", "event 1: unknown key down"),
        ("[[event]]\nat_s = '1'\nspeed = 1", "event 1: at_s must be a number, not '1'"),
        ("[[event]]\nat_s = true\nspeed = 1", "event 1: at_s must be a number, not True"),
        ("[[event]]\nat_s = nan\nspeed = 1", "event 1: at_s must be a number, not nan"),
        ("[[event]]\nat_s = -1\nspeed = 1", "event 1: at_s must be at least 0"),
        ("[[event]]\nat_s = 1\nspeed = 0", "event 1: speed must be positive"),
        ("[[event]]\nat_s = 1\ndown_s = 9\nevery_s = 9", "event 1: down_s must be less than every_s"),
        ("[[event]]\nat_s = 1\ndie = 1", "event 1: die must be true or false, not 1"),
        ("[[event]]\nat_s = 1\ndie = false", "event 1: the event has no effect"),
        ("[[event]]\nat_s = 1\nfaults = 0.1", "event 1: faults must be a table of rates"),
        ("[[event]]\nat_s = 1\nfaults = {reset = 'x'}", "event 1: faults must be a table of rates"),
        ("[[event]]\nat_s = 1\nfaults = {flood = 0.1}", "event 1: unknown fault 'flood'"),
        ("[[event]]\nat_s = 1\nfaults = {reset = 0.6, stall = 0.6}", "event 1: the fault rates"),
        ("[[event]\n", "is not valid TOML"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, said: str) -> None:
    """The message names the file and the event."""
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=r"timeline\.toml") as raised:
        load_timeline(path)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value).replace(str(path), "")


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    """The message names the file."""
    result = CliRunner().invoke(simulate, ["--port", "0", "--timeline", str(tmp_path / "none.toml")])
    assert result.exit_code == 2
    assert "none.toml" in result.output


@contextmanager
def process(tmp_path: Path, timeline: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`streamsyn simulate` with that timeline, and its URL."""
    code = "from streamsyn.cli.simulate import simulate; simulate()"
    options = ["--port", "0", "--timeline", str(written(tmp_path, timeline))]
    with subprocess.Popen(
        [sys.executable, "-c", code, *options], stderr=subprocess.PIPE, text=True
    ) as started:
        assert started.stderr is not None
        try:
            yield started, started.stderr.readline().split()[3]
        finally:
            started.kill()


def listens(url: str) -> bool:
    """Whether a connection is taken there."""
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ConnectionError:
        return False
    return True


def test_a_process_that_flaps(tmp_path: Path) -> None:
    """It refuses connections and then accepts them again, at the same address."""
    with process(tmp_path, "[[event]]\nat_s = 0.2\nevery_s = 0.4\ndown_s = 0.2") as (_, url):
        seen: list[bool] = []
        while seen != [True, False, True, False]:
            now = listens(url)
            if seen[-1:] != [now] and (seen or now):
                seen.append(now)


def test_a_process_that_dies(tmp_path: Path) -> None:
    """The process exits as if by SIGKILL."""
    with process(tmp_path, "[[event]]\nat_s = 0.2\ndie = true") as (started, _):
        assert 137 == started.wait(timeout=20)


@asynccontextmanager
async def over_http(timeline: Timeline, **fields: Any) -> AsyncIterator[tuple[ServerClient, Simulation]]:
    """A server with that timeline behind a socket."""
    async with (
        running(SimulatorConfig(**fields), timeline=timeline) as server,
        http_transport(server.url, {}) as transport,
    ):
        yield ServerClient(server.url, transport, 5), server.simulation


@asynccontextmanager
async def in_process(timeline: Timeline, **fields: Any) -> AsyncIterator[tuple[ServerClient, Simulation]]:
    """A server with that timeline, without a socket."""
    simulation = Simulation(SimulatorConfig(**fields))
    async with playing(timeline, simulation):
        yield ServerClient("http://s", InProcessTransport(simulation), 5), simulation


BOTH = pytest.mark.parametrize("served", [over_http, in_process])


async def outcome(client: ServerClient, rid: str) -> str:
    """What comes of a request: the kind of its error, or how it finished."""
    try:
        return (await client.chat(REQUEST, "m", rid)).finish_reason
    except ServerError as error:
        return type(error).__name__


async def until(client: ServerClient, wanted: str) -> None:
    """Returns when a request ends like that."""
    async with asyncio.timeout(10):
        for number in range(10**6):
            if await outcome(client, f"{wanted}-{number}") == wanted:
                return
            await asyncio.sleep(0.001)


@BOTH
async def test_an_outage_refuses_and_loses_the_cache(served: Any) -> None:
    """Connections are refused while it lasts; then the server is there at its old address, its cache cold."""
    async with served(Timeline([Event(1.0, down_s=0.5)])) as (client, simulation):
        before = [(await client.chat(REQUEST, "m", rid)).cached_tokens > 0 for rid in "ab"]
        await until(client, "ServerUnreachable")
        while simulation.gone:  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)  # it listens a moment later
        after = [(await client.chat(REQUEST, "m", rid)).cached_tokens > 0 for rid in "cd"]
    assert [False, True] == before == after


@BOTH
async def test_an_outage_resets_what_is_under_way(served: Any) -> None:
    """A request in flight is lost at once when the server goes down."""
    async with served(Timeline([Event(1.0, down_s=9)]), latency_ms=60_000) as (client, simulation):
        with pytest.raises(ServerUnavailable):
            await client.chat(REQUEST, "m", "a")
        assert simulation.engine.running == 0
        assert simulation.stats.in_flight == 0
        with pytest.raises(ServerUnreachable):
            await client.chat(REQUEST, "m", "b")


@BOTH
async def test_rates_change_at_run_time(served: Any) -> None:
    """New rates apply to later requests only."""
    timeline = Timeline([Event(0, faults={"http_500": 1.0}), Event(1.0, faults={})])
    async with served(timeline) as (client, _):
        await until(client, "ServerUnavailable")
        await until(client, "stop")


@BOTH
async def test_death_is_for_ever(served: Any) -> None:
    """No later event has an effect."""
    async with served(Timeline([Event(0, die=True), Event(0.01, speed=2)])) as (client, simulation):
        await until(client, "ServerUnreachable")
        await asyncio.sleep(0.02)
        assert simulation.dead
        assert simulation.speed == 1


def test_half_speed_takes_twice_as_long() -> None:
    """Half speed takes effect when set, to the microsecond of virtual time."""

    async def main() -> list[float]:
        clock = asyncio.get_running_loop().time
        took = []
        async with in_process(Timeline([Event(100, speed=0.5)]), latency_ms=1000) as (client, _):
            for at_s in (0, 200):
                await asyncio.sleep(at_s - clock())
                began = clock()
                await client.chat(REQUEST, "m", str(at_s))
                took.append(clock() - began)
        return took

    assert [1, 2] == pytest.approx(run_virtually(main()))


def test_flapping_for_hours() -> None:
    """A server that is down 10 s in every 90: about a ninth of the requests is refused."""

    async def main() -> dict[str, int]:
        counts: dict[str, int] = {}
        async with in_process(Timeline([Event(0, every_s=90, down_s=10)]), words=4) as (client, _):
            for number in range(2880):
                kind = await outcome(client, f"r-{number}")
                counts[kind] = counts.get(kind, 0) + 1
                await asyncio.sleep(10.007)
        return counts

    counts = run_virtually(main())
    assert {"stop", "ServerUnreachable"} == set(counts)
    assert 300 <= counts["ServerUnreachable"] <= 340
    assert counts == run_virtually(main())


def test_a_bug_in_it_ends_the_server() -> None:
    """An error in a timeline ends the server."""

    async def main() -> None:
        async with in_process(Timeline([Event(1, faults={"reset": 1})])) as (_, simulation):
            simulation.faults = None  # type: ignore[assignment]
            await asyncio.sleep(10)

    with pytest.raises(BaseExceptionGroup) as raised:
        run_virtually(main())
    assert isinstance(root_cause(raised.value), AttributeError)
