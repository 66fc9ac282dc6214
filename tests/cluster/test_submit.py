"""A run that is submitted to a cluster survives the loss of its node."""

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from streamsyn.errors import ConfigError
from streamsyn.pipeline.verify import verify
from streamsyn.simulator.app import running
from streamsyn.simulator.settings import SimulatorConfig
from tests.builders import rows
from tests.cluster.conftest import Raylets

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

SEEDS = 300
IN_FLIGHT = 8
NODE = {"num_cpus": 1, "num_gpus": 8}
"""All of a node, so that `Raylets.kill_node` kills that of the run."""


class Requests:
    """The requests that the simulator gets."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.arrived = asyncio.Event()

    def note(self, _number: int, _body: dict[str, Any]) -> None:
        """One has arrived."""
        self.times.append(time.monotonic())
        self.arrived.set()

    async def until(self, number: int) -> None:
        """Wait for the request of this number."""
        async with asyncio.timeout(120):
            while len(self.times) < number:
                self.arrived.clear()
                await self.arrived.wait()


@asynccontextmanager
async def simulated() -> AsyncIterator[tuple[str, Requests]]:
    """A simulated server, and the requests that it gets."""
    requests = Requests()
    async with running(SimulatorConfig(latency_ms=150), script=requests.note) as server:
        yield server.url, requests


def options(tmp_path: Path, number: int = SEEDS) -> list[str]:
    """The options of a run over this many seeds, whose requests are counted."""
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text(
        "".join(f"{json.dumps({'instruction': f'{n}?', 'answer': str(n)})}\n" for n in range(number))
    )
    keys = {
        "fleet.max_in_flight": IN_FLIGHT,
        "fleet.hedge_tail": "false",
        "assembly.contexts_per_sample": 2,
        "sink.shard_bytes": 100_000,
    }
    settings = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    return ["--seeds", str(seeds), "--no-preflight", *settings]


def command(tmp_path: Path, url: str, number: int = SEEDS) -> Any:
    """A run of this many seeds into `tmp_path`/out."""
    from streamsyn.cluster.coordinator import command_of

    out = tmp_path / "out"
    arguments = [*options(tmp_path, number), "--server", url, "--no-progress"]
    return command_of([*arguments, "--out", str(out)], out)


async def test_the_node_of_the_run_dies(raylets: Raylets, tmp_path: Path) -> None:
    """It goes on on another node: each seed has one outcome, and what was in flight is asked once more."""
    from streamsyn.cluster.submitted import submitted

    raylets.at_least(2)
    out, printed = tmp_path / "out", bytearray()
    async with simulated() as (url, requests):
        given = await asyncio.to_thread(command, tmp_path, url)
        with capture_logs() as logs:
            async with asyncio.TaskGroup() as group:
                running_it = group.create_task(
                    submitted(given, raylets.address, printed.extend, NODE),
                    name="submit",
                )
                await requests.until(80)
                await raylets.kill_node()
                died = time.monotonic()
        assert 0 == running_it.result(), printed.decode()
    pause_s, again = max((later - at, later) for at, later in pairwise(requests.times))
    print(f"from the death of its node to the next request: {again - died:.1f} s; none for {pause_s:.1f} s")
    placed = [entry["node"] for entry in logs if entry["event"] == "coordinator.placed"]
    assert 2 == len(placed), logs
    found = await asyncio.to_thread(rows, out, "contexts")
    assert {1} == set(Counter(row["seed_id"] for row in found).values())
    assert SEEDS == len(found)
    problems, _ = await asyncio.to_thread(verify, out)
    assert [] == problems
    # In flight, and answers that had come and were being written while the machine was busy.
    assert SEEDS <= len(requests.times) <= SEEDS + 2 * IN_FLIGHT
    assert b'"epoch":2}' in (out / "manifest.jsonl").read_bytes()
    assert re.search(rb"done after", printed)


async def test_a_run_on_local_disks_goes_on_from_its_mirror(raylets: Raylets, tmp_path: Path) -> None:
    """Its directory is not on the second node; each seed has one outcome there."""
    from streamsyn.cluster.submitted import submitted

    raylets.at_least(2)
    out, far, printed = tmp_path / "out", tmp_path / "far", bytearray()
    async with simulated() as (url, requests):
        given = await asyncio.to_thread(command, tmp_path, url, 150)
        mirror = ("--set", f"sink.mirror={far}", "--set", "sink.shard_bytes=30000")
        given = replace(given, arguments=(*given.arguments, *mirror), is_mirrored=True)
        async with asyncio.TaskGroup() as group:
            running_it = group.create_task(
                submitted(given, raylets.address, printed.extend, NODE), name="submit"
            )
            await requests.until(60)
            while not await asyncio.to_thread(has_shards, far):
                await requests.until(len(requests.times) + 1)
            cut = await asyncio.to_thread(raylets.cut_node)  # so that nobody writes to it where it is now
            await asyncio.to_thread(out.rename, tmp_path / "lost")
            await asyncio.to_thread(raylets.kill, cut.node)
    assert 0 == running_it.result(), printed.decode()
    assert 1 == printed.count(b"mirror.restored")
    found = await asyncio.to_thread(rows, out, "contexts")
    assert list(range(150)) == [row["seq"] for row in found]
    assert 150 == len({row["seed_id"] for row in found})
    problems, _ = await asyncio.to_thread(verify, out)
    assert [] == problems


def has_shards(far: Path) -> bool:
    """Whether a mirror lists shards of contexts."""
    path = far / "manifest.jsonl"
    return path.exists() and b'"kind":"contexts"' in path.read_bytes()


async def test_a_signal_drains_the_run(raylets: Raylets, tmp_path: Path) -> None:
    """As `ray job stop` sends it to the driver: the run ends with 75, on its node."""
    from streamsyn.cluster.submitted import submitted

    raylets.at_least(1)
    out, printed = tmp_path / "out", bytearray()
    async with simulated() as (url, requests):
        given = await asyncio.to_thread(command, tmp_path, url)
        async with asyncio.TaskGroup() as group:
            running_it = group.create_task(
                submitted(given, raylets.address, printed.extend, NODE), name="submit"
            )
            await requests.until(20)
            os.kill(os.getpid(), signal.SIGTERM)
    assert 75 == running_it.result()
    assert b"stopped by SIGTERM" in printed
    assert len(requests.times) == len(await asyncio.to_thread(rows, out, "contexts")) < SEEDS


async def test_a_node_without_the_directory(
    raylets: Raylets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, and the run is not begun anew. While it has no place, another line says so."""
    from streamsyn.cluster import coordinator
    from streamsyn.cluster.coordinator import RunCommand
    from streamsyn.cluster.submitted import submitted

    raylets.at_least(1)
    monkeypatch.setattr(coordinator, "_WAITING_S", 0.0)
    given = RunCommand(("--version",), tmp_path / "out", Path("/nowhere"))
    async with asyncio.timeout(100):
        with (
            capture_logs() as logs,
            pytest.raises(ConfigError, match=r"/nowhere is not on .*: submit from a folder"),
        ):
            await submitted(given, raylets.address, sys.stderr.write, NODE)  # type: ignore[arg-type]
    assert ["coordinator.waiting"] == [entry["event"] for entry in logs][:1]
