"""A run with partitions whose coordinators Ray places: the node of one dies, and servers come and go."""

import asyncio
import json
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import streamsyn
from streamsyn.pipeline.verify import verify
from tests.cluster.conftest import Raylets
from tests.cluster.test_submit import IN_FLIGHT, options, simulated

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

SEEDS = 300
SIMULATE = (sys.executable, "-m", "streamsyn", "simulate", "--host", "{host}", "--port", "{port}")


def placing(latency_ms: int, replicas: int = 1) -> list[str]:
    """The options for servers that Ray places, each with the GPUs of a node."""
    simulate = json.dumps([*SIMULATE, "--latency-ms", str(latency_ms)])
    sizes = ["--replicas", str(replicas), "--gpus-per-replica", "8"]
    return ["--model", "simulated", *sizes, "--set", f"cluster.command={simulate}"]


@asynccontextmanager
async def partitioned(
    tmp_path: Path, raylets: Raylets, *more: str, number: int = SEEDS
) -> AsyncIterator[Process]:
    """`streamsyn run --partitions 2 --ray` over all seeds into `tmp_path`/out, whose lines are to be read."""
    given = await asyncio.to_thread(options, tmp_path, number)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "streamsyn", "run", *given, "--out", str(tmp_path / "out")),
        *("--partitions", "2", "--ray", raylets.address, "--log-json", *more),
        stdin=DEVNULL,
        stdout=DEVNULL,
        stderr=PIPE,
        limit=2**24,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def end(process: Process) -> tuple[int, list[dict[str, Any]]]:
    """Its exit code, and what it logged from now on."""
    assert process.stderr is not None
    lines = [line async for line in process.stderr]
    logged = [json.loads(line) for line in lines if line.startswith(b"{")]
    return await process.wait(), logged


async def until(process: Process, event: str, number: int = 1) -> None:
    """Wait until it has logged an event this many times."""
    assert process.stderr is not None
    async with asyncio.timeout(120):
        seen = []
        while number:
            line = await process.stderr.readline()
            seen.append(line)
            assert line, b"".join(seen).decode()
            number -= f'"event":"{event}"'.encode() in line.replace(b": ", b":")


async def check(out: Path, number: int = SEEDS) -> None:
    """Each seed has one outcome, and the directory is in order."""
    found = await asyncio.to_thread(lambda: list(streamsyn.follow(out, kind="contexts")))
    assert {1} == set(Counter(row["seed_id"] for row in found).values())
    assert number == len(found)
    assert {0, 1} == {row["partition"] for row in found}
    for directory in (out / "partition-000", out / "partition-001"):
        problems, _ = await asyncio.to_thread(verify, directory)
        assert [] == problems


async def test_the_node_of_a_coordinator_dies(raylets: Raylets, tmp_path: Path) -> None:
    """It goes on on another node: each seed has one outcome, and what was in flight is asked once more."""
    raylets.at_least(3)
    async with simulated() as (url, requests), partitioned(tmp_path, raylets, "--server", url) as process:
        await until(process, "coordinator.placed", 2)
        await requests.until(80)
        await asyncio.to_thread(raylets.kill_node_without, "CPU")
        code, logged = await end(process)
    assert 0 == code, logged
    restarts = [entry for entry in logged if entry["event"] == "coordinator.restarts"]
    assert 1 == len(restarts)
    assert 1 == sum(entry["event"] == "coordinator.placed" for entry in logged)
    await check(tmp_path / "out")
    # Half of them in flight at the node, and answers that had come and were being written.
    assert SEEDS <= len(requests.times) <= SEEDS + IN_FLIGHT
    manifest = tmp_path / "out" / f"partition-00{restarts[0]['partition']}" / "manifest.jsonl"
    assert b'"epoch":2}' in await asyncio.to_thread(manifest.read_bytes)


async def test_a_signal_drains_all_coordinators(raylets: Raylets, tmp_path: Path) -> None:
    """The command ends with 75; its servers are those that Ray placed, and all of them got the signal."""
    raylets.at_least(3)
    async with partitioned(tmp_path, raylets, *placing(latency_ms=100)) as process:
        await until(process, "run.started", 2)
        process.send_signal(signal.SIGTERM)
        code, logged = await end(process)
    assert 75 == code, logged
    (done,) = (entry for entry in logged if entry["event"] == "run.done" and "partitions" in entry)
    assert [75, 75] == [one["exit_code"] for one in done["partitions"]]


@pytest.mark.torture
@pytest.mark.parametrize("kills", [4])
async def test_nodes_of_coordinators_die_again_and_again(
    raylets: Raylets, tmp_path: Path, kills: int
) -> None:
    """Whichever they are, nothing is lost, and only what was in flight there is asked again."""
    number = 100 * (kills + 1)
    raylets.at_least(3)
    async with (
        simulated() as (url, requests),
        partitioned(tmp_path, raylets, "--server", url, number=number) as process,
        asyncio.TaskGroup() as group,
    ):
        ending = group.create_task(end(process), name="end")
        for kill in range(1, kills + 1):
            await requests.until(100 * kill)
            await asyncio.to_thread(raylets.kill_node_without, "CPU")
            raylets.at_least(3)
    code, logged = ending.result()
    assert 0 == code, logged
    assert kills == sum(entry["event"] == "coordinator.restarts" for entry in logged)
    await check(tmp_path / "out", number)
    repeated = len(requests.times) - number
    assert 0 <= repeated <= kills * IN_FLIGHT // 2
    print(f"\n{kills} of two coordinators died, {number} seeds: {repeated} requests repeated")


@pytest.mark.torture
async def test_the_node_of_a_server_of_all_coordinators_dies(raylets: Raylets, tmp_path: Path) -> None:
    """Each of them learns of it, and of the server that is placed in its stead."""
    raylets.at_least(5)
    async with partitioned(tmp_path, raylets, *placing(latency_ms=500, replicas=2)) as process:
        await until(process, "run.started", 2)
        await raylets.kill_node()
        code, logged = await end(process)
    assert 0 == code, logged
    for change in ("added", "removed"):
        told = [entry for entry in logged if entry["event"] == "fleet.servers_changed" and entry[change]]
        assert {0, 1} == {entry["partition"] for entry in told}
    await check(tmp_path / "out")
