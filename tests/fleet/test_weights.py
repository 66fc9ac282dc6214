"""A server is given other weights while requests are in flight: the simulator does as the real one, and our
fleet comes through it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from streamsyn.config.sections import FleetSection
from streamsyn.errors import RequestRefused, ServerError
from streamsyn.fleet import weight_update
from streamsyn.fleet.fleet import Fleet, open_fleet
from streamsyn.fleet.weight_update import PauseMode
from streamsyn.records import Attempt, Request
from streamsyn.simulator.in_process import InProcessServers, InProcessTransport
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation

URL = "http://there"
FIRST = "step_1"
ASKED = Request(messages=[{"role": "user", "content": "About geese."}], sampling={"max_tokens": 50})


def trained(tmp_path: Path) -> Path:
    """A directory that looks like a model."""
    folder = tmp_path / FIRST
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def server(**options: Any) -> tuple[Simulation, InProcessTransport]:
    """A simulated one, and the way to it."""
    simulation = Simulation(SimulatorConfig(latency_ms=20, ms_per_token=1, **options))
    return simulation, InProcessTransport(simulation, URL)


async def asked(transport: InProcessTransport, method: str, path: str, body: Any = None) -> Any:
    """What it says, as an object."""
    reply = await transport.exchange(method, path, body=orjson.dumps(body) if body else None, timeout_s=5)
    return orjson.loads(reply.body) if reply.body else reply.status


async def given(transport: InProcessTransport, folder: Path, mode: PauseMode) -> None:
    """Pause, load, go on."""
    await weight_update.pause(transport, URL, mode, 5)
    try:
        await weight_update.load_weights(transport, URL, folder, folder.name, mode, 5)
    finally:
        await weight_update.resume(transport, URL)


async def until(holds: Callable[[], bool]) -> None:
    """Let others go on until it holds; the simulator tells of nothing by itself."""
    while not holds():  # noqa: ASYNC110
        await asyncio.sleep(0)


CHAT = {"model": "m", "messages": ASKED.messages, "max_tokens": 50}


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_what_is_in_flight_is_held_and_goes_on(tmp_path: Path, mode: PauseMode) -> None:
    """During a pause no request is answered; afterwards those in flight and new ones are."""
    folder = await asyncio.to_thread(trained, tmp_path)
    simulation, transport = server()
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        early = group.create_task(asked(transport, "POST", "/v1/chat/completions", CHAT))
        await until(lambda: simulation.stats.in_flight > 0)
        await weight_update.pause(transport, URL, mode, 5)
        late = group.create_task(asked(transport, "POST", "/v1/chat/completions", CHAT))
        health = group.create_task(asked(transport, "GET", "/health"))
        done, _ = await asyncio.wait([early, late, health], timeout=0.2)
        assert not done
        assert 503 == await asked(transport, "GET", "/ready")
        await weight_update.load_weights(transport, URL, folder, FIRST, mode, 5)
        await weight_update.resume(transport, URL)

    assert ["length", "length"] == [one.result()["choices"][0]["finish_reason"] for one in (early, late)]
    assert {FIRST} == {late.result()["metadata"]["weight_version"]}
    assert 200 == health.result()
    told = await asked(transport, "GET", "/model_info")
    assert (str(folder), FIRST) == (told["model_path"], told["weight_version"])


async def test_abort_gives_up_what_is_in_flight(tmp_path: Path) -> None:
    """The pause begins when no request runs; aborted requests say `abort`."""
    folder = await asyncio.to_thread(trained, tmp_path)
    simulation, transport = server()
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        early = group.create_task(asked(transport, "POST", "/v1/chat/completions", CHAT))
        await until(lambda: simulation.engine.running > 0)
        await weight_update.pause(transport, URL, "abort", 5)
        assert "abort" == (await early)["choices"][0]["finish_reason"]
        await weight_update.load_weights(transport, URL, folder, FIRST, "abort", 5)
        await weight_update.resume(transport, URL)


async def test_an_update_without_a_pause_waits_for_what_runs(tmp_path: Path) -> None:
    """As the real server's lock."""
    folder = await asyncio.to_thread(trained, tmp_path)
    simulation, transport = server()
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        early = group.create_task(asked(transport, "POST", "/v1/chat/completions", CHAT))
        await until(lambda: simulation.stats.in_flight > 0)
        await weight_update.load_weights(transport, URL, folder, FIRST, "retract", 5)

    assert early.done()
    assert "default" == early.result()["metadata"]["weight_version"]


async def test_the_prefix_cache_is_emptied(tmp_path: Path) -> None:
    """New weights do not use the old prefix cache; `in_place` keeps it, since requests use it."""
    folder = await asyncio.to_thread(trained, tmp_path)
    _, transport = server()
    long = CHAT | {"messages": [{"role": "user", "content": "geese " * 300}]}
    cached = []
    for mode in (None, "in_place", "retract"):
        if mode is not None:
            await given(transport, folder, mode)
        answer = await asked(transport, "POST", "/v1/chat/completions", long)
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [0, 0] == [cached[0], cached[2]]
    assert cached[1] > 100


async def test_invalid_weights_are_refused(tmp_path: Path) -> None:
    """The server refuses, keeps its old weights, and continues."""
    _, transport = server()
    with pytest.raises(RequestRefused, match="nothing is not a model"):
        await given(transport, tmp_path / "nothing", "retract")

    answer = await asked(transport, "POST", "/v1/chat/completions", CHAT)
    assert "default" == answer["metadata"]["weight_version"]


@asynccontextmanager
async def a_fleet(simulation: Simulation, **keys: Any) -> AsyncIterator[Fleet]:
    """A fleet of this one server."""
    section = FleetSection(servers=(URL,), backoff_base_s=0.001, probe_interval_s=0.01, **keys)
    async with open_fleet(section, lambda _: None, {}, InProcessServers({URL: simulation}).connect) as fleet:
        await fleet.ask_models()
        yield fleet


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
async def test_a_fleet_comes_through_an_update(tmp_path: Path, mode: PauseMode) -> None:
    """No request fails, whatever becomes of those in flight, and each completion tells its weights: streamed
    ones, which say nothing themselves, too.
    """
    folder = await asyncio.to_thread(trained, tmp_path)
    simulation, transport = server()
    grouped = Request(messages=ASKED.messages, sampling=ASKED.sampling, group="g")
    tries: list[Attempt] = []
    async with asyncio.timeout(10), a_fleet(simulation) as fleet:
        before = await fleet.complete(ASKED, [])
        async with asyncio.TaskGroup() as group:
            asking = [group.create_task(fleet.complete(ASKED, tries)) for _ in range(5)]
            await until(lambda: simulation.engine.running == 5)
            await given(transport, folder, mode)
        after = await fleet.complete(grouped, [])

    assert "default" == before.weight_version
    assert FIRST == after.weight_version, "the first of its group is streamed"
    assert all(task.result().weight_version in {"default", FIRST} for task in asking)
    assert {"abort": 10}.get(mode, 5) == len(tries)
    assert {"simulated"} == {task.result().model for task in asking}


async def test_a_server_with_other_weights_comes_back_under_its_name(tmp_path: Path) -> None:
    """Its model has the name of the directory, and is still recognized."""
    folder = await asyncio.to_thread(trained, tmp_path)
    simulation, transport = server()
    async with asyncio.timeout(10), a_fleet(simulation, eject_after=1, max_attempts=1) as fleet:
        await given(transport, folder, "retract")
        assert [str(folder)] == [one["id"] for one in (await asked(transport, "GET", "/v1/models"))["data"]]
        simulation.engine.lose_all()
        (there,) = fleet.servers
        fleet._membership.eject(there, ServerError("a try of ours"))
        there.health.ejected = True
        again = await fleet.complete(ASKED, [])
    async with asyncio.timeout(10), a_fleet(simulation) as other:
        assert ["simulated"] == other.models

    assert (FIRST, "simulated") == (again.weight_version, again.model)


async def test_a_server_that_starts_again_has_its_first_weights(tmp_path: Path) -> None:
    """A restarted server has its first weights and is not paused."""
    folder = await asyncio.to_thread(trained, tmp_path)
    simulation, transport = server()
    await given(transport, folder, "retract")
    await weight_update.pause(transport, URL, "retract", 5)
    simulation.go_down()
    simulation.come_up()

    answer = await asked(transport, "POST", "/v1/chat/completions", CHAT)
    assert "default" == answer["metadata"]["weight_version"]
