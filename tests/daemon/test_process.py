"""The daemon as a process: how it ends, and what a kill leaves."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from streamsyn.simulator.app import running
from streamsyn.simulator.settings import SimulatorConfig
from tests.daemon.conftest import seed_lines

pytestmark = pytest.mark.crash


class Process:
    """A daemon in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, session: aiohttp.ClientSession) -> None:
        self.process = process
        self.url = url
        self.session = session

    async def ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Send a request that must succeed; returns the JSON of the answer."""
        async with self.session.request(method, path, json=body) as answer:
            content: dict[str, Any] = await answer.json()
            assert answer.ok, content
            return content

    async def submit(self, run_id: str, seeds: int) -> None:
        """Post seeds to a run."""
        body = b"\n".join(seed_lines(seeds))
        async with self.session.post(f"/v1/runs/{run_id}/seeds", data=body) as answer:
            assert answer.status == 202, await answer.text()

    async def until(self, run_id: str, state: str) -> dict[str, Any]:
        """Wait until a run has a state."""
        async with asyncio.timeout(30):
            while (run := await self.ask("GET", f"/v1/runs/{run_id}"))["state"] != state:  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # it is another process
            return run


async def started(root: Path, *arguments: str) -> asyncio.subprocess.Process:
    """Start the command; its log is JSON on stderr."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "streamsyn", "serve", str(root), "--listen", "127.0.0.1:0", "--log-json"),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


@asynccontextmanager
async def serving(root: Path, *arguments: str) -> AsyncIterator[Process]:
    """A daemon that listens; killed at the end of the block if it still runs."""
    process = await started(root, *arguments)
    assert process.stderr is not None
    try:
        async with asyncio.timeout(30):
            async for line in process.stderr:
                event = json.loads(line)
                if event["event"] == "daemon.listening":
                    break
            else:
                raise AssertionError("it did not begin to listen")
        async with (
            aiohttp.ClientSession(event["url"]) as session,
            asyncio.TaskGroup() as group,
        ):
            reading = group.create_task(drained(process.stderr), name="stderr")
            yield Process(process, event["url"], session)
            reading.cancel()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def drained(stream: asyncio.StreamReader) -> None:
    """Read a stream to its end, so that its writer never waits."""
    while await stream.read(2**16):
        pass


async def test_runs_go_on_after_a_kill(tmp_path: Path) -> None:
    """After SIGKILL running ones go on and the others wait; each seed has one outcome."""
    async with running(SimulatorConfig(ms_per_token=0.5)) as simulator:
        server = ("--server", simulator.url)
        async with serving(tmp_path / "root", *server) as daemon:
            for name in ("runs", "paused", "stopped"):
                await daemon.ask("POST", "/v1/runs", {"id": name, "config": {"recipe": {"max_tokens": 200}}})
                await daemon.submit(name, 40)
            await daemon.ask("POST", "/v1/runs/paused/pause")
            await daemon.ask("POST", "/v1/runs/stopped/drain")
            daemon.process.send_signal(signal.SIGKILL)
            await daemon.process.wait()
        async with serving(tmp_path / "root", *server) as daemon:
            states = {run["id"]: run for run in (await daemon.ask("GET", "/v1/runs"))["data"]}
            assert {name: run["state"] for name, run in states.items()} == {
                "runs": "running",
                "paused": "paused",
                "stopped": "stopped",
            }
            assert {run["counts"]["accepted"] for run in states.values()} == {40}
            for name in states:
                await daemon.ask("POST", f"/v1/runs/{name}/resume")
                await daemon.ask("POST", f"/v1/runs/{name}/close")
            for name in states:
                run = await daemon.until(name, "finished")
                assert run["counts"]["contexts"] + run["counts"]["rejects"] == 40
                assert sum(run["rejects"].values()) == run["counts"]["rejects"]


async def test_sigterm_drains(tmp_path: Path) -> None:
    """What is in flight is finished, the exit code is 0, and a run goes on at the next start."""
    async with running(SimulatorConfig(ms_per_token=2.0)) as simulator:
        async with serving(tmp_path / "root", "--server", simulator.url) as daemon:
            await daemon.ask("POST", "/v1/runs", {"id": "run", "config": {"recipe": {"max_tokens": 100}}})
            await daemon.submit("run", 200)
            while not (await daemon.ask("GET", "/v1/runs/run"))["counts"]["in_flight"]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            daemon.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(20):
                assert await daemon.process.wait() == 0
        assert simulator.simulation.stats.aborted == 0
        assert simulator.simulation.stats.disconnected == 0
        record = orjson.loads((tmp_path / "root" / "runs" / "run" / "service.json").read_bytes())
        assert record["state"] == "running"


async def test_a_second_daemon_is_refused(tmp_path: Path) -> None:
    """It names the process that serves the directory."""
    async with serving(tmp_path / "root") as daemon:
        process = await started(tmp_path / "root")
        _, errors = await process.communicate()
        assert process.returncode == 2
        assert f"pid {daemon.process.pid}" in errors.decode()


async def test_clients_do_not_hold_up_the_end(tmp_path: Path) -> None:
    """A body that is still being sent, and a stream that is still being read, end with the daemon."""
    gone = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield seed_lines(1)[0] + b"\n"
        gone.set()
        await asyncio.Event().wait()

    async def post(daemon: Process) -> None:
        with pytest.raises(aiohttp.ClientError):
            async with daemon.session.post("/v1/runs/run/seeds", data=slowly()) as answer:
                answer.raise_for_status()

    async def follow(daemon: Process) -> None:
        with contextlib.suppress(aiohttp.ClientError):
            async with daemon.session.get("/v1/runs/run/samples?follow=1") as answer:
                await answer.read()

    async with serving(tmp_path / "root", "--server", "http://127.0.0.1:9") as daemon:
        await daemon.ask("POST", "/v1/runs", {"id": "run"})
        async with asyncio.TaskGroup() as group:
            group.create_task(post(daemon), name="post")
            group.create_task(follow(daemon), name="follow")
            await gone.wait()
            daemon.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(20):
                assert await daemon.process.wait() == 0
