"""Membership changes, several models, prefixes, over real sockets to simulated servers."""

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from structlog.testing import capture_logs

from streamsyn.config.sections import FleetSection
from streamsyn.errors import ConfigError, FleetGone
from streamsyn.fleet.fleet import Fleet, open_fleet
from streamsyn.fleet.server import Server
from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.fleet.transport import Transport
from streamsyn.records import Attempt, Completion, Request, digest
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.simulator.virtual_time import run_virtually
from tests.fleet.test_fleet import ask_many, fleet_of, opened, simulators, until

TEMPLATE = "You write documents. " * 200


def request(group: str, number: int) -> Request:
    """One of a group's: template, the group's text, its own."""
    messages = [
        {"role": "system", "content": TEMPLATE},
        {"role": "user", "content": f"{group} " * 300 + f"question {number}"},
    ]
    key = digest(group).hex()
    return Request(messages, {"max_tokens": 64}, key, ("template", key))


async def ask_groups(fleet: Fleet, groups: int, each: int) -> list[tuple[str, Completion]]:
    """Requests of several groups at once, by turns."""
    asked = [(f"group-{group}", number) for number in range(each) for group in range(groups)]
    async with asyncio.TaskGroup() as tasks:
        answers = [tasks.create_task(fleet.complete(request(*one), [])) for one in asked]
    return [(group, task.result()) for (group, _), task in zip(asked, answers, strict=True)]


@pytest.mark.usefixtures("no_task_left")
async def test_groups_stay_together_and_find_their_prefix() -> None:
    """Each group stays at one server; all but its first request find template and group in the cache."""
    async with simulators() as simulated:
        servers = [await simulated.start(latency_ms=5) for _ in range(3)]
        async with fleet_of(*(server.url for server in servers), concurrency=64) as fleet:
            answers = await ask_groups(fleet, 12, 8)
            figures = fleet.metrics()
    where = Counter((group, answer.server) for group, answer in answers)
    assert 12 == len(where), "a group was split"
    assert max(Counter(url for _, url in where).values()) <= 5
    full = 8 * 12 - 12
    warm = sum(answer.cached_tokens >= 0.9 * answer.prompt_tokens for _, answer in answers)
    assert warm >= full
    planned = sum(server["planned_cached_tokens"] for server in figures)
    achieved = sum(server["cached_tokens"] for server in figures)
    assert 0.95 * planned <= achieved <= 1.1 * planned


@pytest.mark.usefixtures("no_task_left")
async def test_the_routing_key_goes_along() -> None:
    """The header has the group's key, for routers; it is missing without a group."""
    seen: list[str | None] = []

    async with simulators() as simulated:
        server = await simulated.start()
        async with fleet_of(server.url) as fleet:
            transport = fleet.servers[0].client.transport
            exchange = transport.exchange

            async def noted(method: str, path: str, **given: object) -> object:
                headers: dict[str, str] = given.get("headers", {})  # type: ignore[assignment]
                if "chat" in path:
                    seen.append(headers.get("X-SMG-Routing-Key"))
                return await exchange(method, path, **given)  # type: ignore[arg-type]

            transport.exchange = noted  # type: ignore[assignment,method-assign]
            await fleet.complete(request("group", 1), [])
            await fleet.complete(Request([{"role": "user", "content": "Geese?"}], {}), [])
    assert [digest("group").hex(), None] == seen


@pytest.mark.usefixtures("no_task_left")
async def test_servers_come_and_go_with_the_file(tmp_path: Path) -> None:
    """A new line adds a server; without its line a server finishes its requests and gets no more."""
    file = tmp_path / "servers.txt"
    async with simulators() as simulated:
        first, second = await simulated.start(latency_ms=20), await simulated.start()
        await write(file, f"{first.url}\n")
        settings: dict[str, Any] = {"servers_file": file, "discover_interval_s": 0.02, "max_in_flight": 4}
        async with opened(**settings) as fleet:
            await fleet.ask_models()
            assert {first.url} == {answer.server for answer in await ask_many(fleet, 4)}
            await write(file, f"{first.url}\n{second.url} weight=2\n")
            await until(lambda: len(fleet.servers) == 2 and fleet.servers[1].is_usable)
            assert 2.0 == fleet.servers[1].weight
            assert {first.url, second.url} == {answer.server for answer in await ask_many(fleet, 12)}
            await write(file, f"{first.url} drain\n{second.url}\n")
            await until(lambda: fleet.servers[0].draining)
            assert {second.url} == {answer.server for answer in await ask_many(fleet, 12)}
            await write(file, f"{first.url}\n")
            await until(lambda: [one.url for one in fleet.servers if one.is_usable] == [first.url])
            assert {first.url} == {answer.server for answer in await ask_many(fleet, 4)}
            await write(file, f"{first.url}\n{second.url}\n")
            await until(lambda: len(fleet.servers) == 2 and all(server.is_usable for server in fleet.servers))
            assert {first.url, second.url} == {answer.server for answer in await ask_many(fleet, 12)}


async def write(path: Path, text: str) -> None:
    """Put a whole file in place, as an editor does."""

    def put() -> None:
        new = path.with_suffix(".new")
        new.write_text(text)
        new.replace(path)

    await asyncio.to_thread(put)


@pytest.mark.usefixtures("no_task_left")
async def test_a_server_that_goes_finishes_what_it_has(tmp_path: Path) -> None:
    """Requests in flight there are answered there; those that wait for it go elsewhere."""
    file = tmp_path / "servers.txt"
    async with simulators() as simulated:
        going, staying = await simulated.start(latency_ms=300), await simulated.start()
        await write(file, f"{going.url}\n")
        settings: dict[str, Any] = {"servers_file": file, "discover_interval_s": 0.02, "max_in_flight": 2}
        async with opened(**settings) as fleet, asyncio.TaskGroup() as group:
            await fleet.ask_models()
            asking = [group.create_task(ask_many(fleet, 1)) for _ in range(4)]
            await until(lambda: going.simulation.stats.in_flight == 2)
            await write(file, f"{staying.url}\n")
            await until(lambda: fleet.servers[0].draining)
            answers = [(await task)[0].server for task in asking]
    assert Counter({going.url: 2, staying.url: 2}) == Counter(answers)
    assert 0 == going.simulation.stats.aborted + going.simulation.stats.disconnected


@pytest.mark.usefixtures("no_task_left")
async def test_several_models_get_their_shares() -> None:
    """A draft gets the same model each time, at a server that has it."""
    async with simulators() as simulated:
        big, small = await simulated.start(model="big"), await simulated.start(model="small")
        shares = {"big": 3.0, "small": 1.0}
        async with fleet_of(small.url, big.url, models=shares) as fleet:
            keys = [digest(f"draft {number}") for number in range(400)]
            models = [fleet.model_of(key) for key in keys]
            assert models == [fleet.model_of(key) for key in keys]
            assert 240 < Counter(models)["big"] < 360
            attempts: list[Attempt] = []
            plain = Request([{"role": "user", "content": "Geese?"}], {})
            answers = [await fleet.complete(plain, attempts, model) for model in ("big", "small")]
    assert [("big", big.url), ("small", small.url)] == [(answer.model, answer.server) for answer in answers]


@pytest.mark.usefixtures("no_task_left")
async def test_a_server_with_none_of_the_models() -> None:
    """The start names its URL."""
    async with simulators() as simulated:
        server = await simulated.start(model="other")
        async with opened(server.url, models={"big": 1.0}) as fleet:
            with pytest.raises(ConfigError, match=r"fleet\.models: http.* serves other, none of big"):
                await fleet.ask_models()


@pytest.mark.usefixtures("no_task_left")
async def test_a_model_that_nobody_serves_ends_the_run() -> None:
    """After `give_up_s` the run ends even if other models are served: its drafts would wait for ever."""
    async with simulators() as simulated:
        server = await simulated.start(model="big")
        gone = asyncio.Event()
        shares = {"big": 1.0, "typo": 1.0}
        async with fleet_of(server.url, models=shares, give_up_s=1.0, on_gone=lambda _: gone.set()) as fleet:
            while not gone.is_set():
                await fleet.complete(Request([{"role": "user", "content": "Geese?"}], {}), [], "big")


@pytest.mark.usefixtures("no_task_left")
async def test_only_draining_servers(tmp_path: Path) -> None:
    """If all servers are draining, the start gives up."""
    async with simulators() as simulated:
        file = tmp_path / "servers.txt"
        server = await simulated.start()
        await write(file, f"{server.url} drain\n")
        async with opened(servers_file=file, give_up_s=1.0) as fleet:
            with pytest.raises(FleetGone, match="is draining"):
                await fleet.ask_models()


@pytest.mark.usefixtures("no_task_left")
async def test_a_server_that_is_listed_while_the_first_is_waited_for(tmp_path: Path) -> None:
    """A server that is listed during the start is asked too."""
    async with simulators() as simulated:
        file = tmp_path / "servers.txt"
        await write(file, "http://127.0.0.1:9\n")
        async with opened(servers_file=file, discover_interval_s=0.02) as fleet, asyncio.TaskGroup() as group:
            asking = group.create_task(fleet.ask_models())
            await until(lambda: fleet.servers)
            server = await simulated.start()
            await write(file, f"http://127.0.0.1:9\n{server.url}\n")
            await asking
            assert {server.url} == {answer.server for answer in await ask_many(fleet, 4)}


@pytest.mark.usefixtures("no_task_left")
async def test_one_that_hangs_does_not_hold_up_the_start() -> None:
    """A server that accepts connections and does not answer is left out until it does."""
    writers: list[asyncio.StreamWriter] = []
    mute = await asyncio.start_server(lambda _reader, writer: writers.append(writer), "127.0.0.1", 0)
    url = f"http://127.0.0.1:{mute.sockets[0].getsockname()[1]}"
    try:
        async with simulators() as simulated:
            server = await simulated.start()
            async with fleet_of(url, server.url) as fleet:
                assert [True, False] == [server.health.ejected for server in fleet.servers]
    finally:
        mute.close()
        for writer in writers:
            writer.close()
            await writer.wait_closed()


@pytest.mark.usefixtures("no_task_left")
async def test_a_server_that_comes_back_while_it_leaves_is_one(tmp_path: Path) -> None:
    """Its requests continue, its cap covers all of them, and its counters are reported once."""
    file = tmp_path / "servers.txt"
    async with simulators() as simulated:
        server, other = await simulated.start(latency_ms=200), await simulated.start()
        await write(file, f"{server.url}\n{other.url}\n")
        settings: dict[str, Any] = {"servers_file": file, "discover_interval_s": 0.02, "concurrency": 2}
        async with opened(**settings) as fleet, asyncio.TaskGroup() as group:
            await fleet.ask_models()
            asking = group.create_task(ask_many(fleet, 4))
            await until(lambda: server.simulation.stats.in_flight == 2)
            await write(file, f"{other.url}\n")
            await until(lambda: fleet.servers[0].draining)
            await write(file, f"{server.url}\n{other.url}\n")
            await until(lambda: not fleet.servers[0].draining)
            await asking
            assert [server.url, other.url] == [one.url for one in fleet.servers]
            await write(file, f"{other.url}\n")
            await until(lambda: len(fleet.servers) == 1)
            told = {one["server"]: one["completions"] for one in fleet.metrics()}
    assert {server.url: 2, other.url: 2} == told


class Closing(InProcessServers):
    """Simulated servers; notes which connections were closed, and when."""

    def __init__(self, simulations: dict[str, Simulation]) -> None:
        super().__init__(simulations)
        self.closed: dict[str, float] = {}

    @asynccontextmanager
    async def connect(self, spec: ServerSpec) -> AsyncIterator[Transport]:
        async with super().connect(spec) as transport:
            yield transport
            self.closed[spec.url] = asyncio.get_running_loop().time()


@pytest.mark.parametrize("ending", ["answered", "cancelled"])
def test_a_removed_server_is_let_go_as_soon_as_it_has_answered(ending: str) -> None:
    """Its connections are closed at once, after an abort was sent; nothing refers to it any more."""
    leaving, staying = "http://leaving-3:1", "http://staying-3:1"  # names that no other test has servers of

    async def main() -> None:
        simulations = {url: Simulation(SimulatorConfig(latency_ms=5000)) for url in (leaving, staying)}
        servers = Closing(simulations)
        section = FleetSection(servers=(leaving, staying), load_interval_s=600.0)
        async with open_fleet(section, lambda _: None, {}, servers.connect, Random(0)) as fleet:
            await fleet.ask_models()
            asking = asyncio.create_task(fleet.complete(request("geese", 1), []))
            await asyncio.sleep(1)
            await fleet._membership.apply([ServerSpec(staying)])
            await asyncio.sleep(1)
            assert {} == servers.closed
            if ending == "cancelled":
                asking.cancel()
            await asyncio.wait([asking])
            ended = asyncio.get_running_loop().time()
            await asyncio.sleep(0.1)
            assert {leaving: ended} == servers.closed
            assert [staying] == [server.url for server in fleet.servers]
            del asking  # its traceback refers to the server
            gc.collect()
            kept = [one for one in gc.get_objects() if type(one) is Server and one.url == leaving]
            assert [] == kept
        assert simulations[leaving].stats.by_route["/abort_request"] == (ending == "cancelled")

    run_virtually(main())


def test_an_idle_server_that_is_removed_is_let_go_at_once() -> None:
    """Its load watch ends with it, even in the middle of a reading."""

    async def main() -> None:
        urls = ("http://one:1", "http://two:1")
        servers = Closing({url: Simulation(SimulatorConfig()) for url in urls})
        section = FleetSection(servers=urls)
        async with open_fleet(section, lambda _: None, {}, servers.connect, Random(0)) as fleet:
            await fleet.ask_models()
            await fleet._membership.apply([ServerSpec(urls[1])])
            await asyncio.sleep(0.1)
            assert {urls[0]} == servers.closed.keys()
            names = {task.get_name() for task in asyncio.all_tasks()}
            assert f"load-{urls[1]}" in names
            assert f"load-{urls[0]}" not in names

    run_virtually(main())


async def cap_after(requests: int, *, tells_load: bool, **config: Any) -> tuple[Fleet, Simulation]:
    """A fleet of one server that has answered so many requests, asked at once, in virtual time."""
    simulation = Simulation(SimulatorConfig(**config))
    servers = InProcessServers({"http://one:1": simulation})
    section = FleetSection(servers=("http://one:1",))
    async with open_fleet(section, lambda _: None, {}, servers.connect, Random(0)) as fleet:
        if not tells_load:
            fleet.servers[0].client.load = tells_none  # type: ignore[method-assign]
        await fleet.ask_models()
        await ask_many(fleet, requests)
        return fleet, simulation


async def tells_none() -> None:
    """As a server that has no such route."""


@pytest.mark.parametrize("slots", [4, 24, 200])
def test_the_cap_grows_to_what_a_server_runs(slots: int) -> None:
    """With load metrics the cap is the batch size and a short queue."""
    fleet, simulation = run_virtually(cap_after(20 * slots, tells_load=True, slots=slots, latency_ms=3000))
    assert slots <= fleet.capacity <= 1.25 * slots + 4
    assert simulation.stats.max_in_flight <= 2 * slots + 8
    assert fleet.metrics()[0]["decisions"]


def test_a_server_without_loads_is_asked_all_the_same() -> None:
    """Without load metrics the cap follows the answers, less exactly."""
    fleet, _ = run_virtually(cap_after(3000, tells_load=False, slots=24, latency_ms=1000))
    assert 20 <= fleet.capacity <= 60


@pytest.mark.parametrize("concurrency", ["auto", 64])
async def test_caps_stay_below_the_limit_of_open_files(concurrency: str | int) -> None:
    """Two servers share the connections that this process can open; one line reports it."""
    servers = ["http://a:1", "http://b:1"]
    section = FleetSection.model_validate({"servers": servers, "concurrency": concurrency})
    with capture_logs() as lines:
        async with open_fleet(section, lambda _: None, max_sockets=100) as fleet:
            limits = [getattr(server.limiter, "ceiling", server.limiter.cap) for server in fleet.servers]
    assert limits == [50, 50]
    (line,) = lines
    assert "at most 50 requests in flight per server" in line["why"]
    assert "ulimit -n" in line["why"]
