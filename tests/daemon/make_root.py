"""Makes the directory of a daemon that tests of later versions read.

    python -m tests.daemon.make_root tests/daemon/roots/VERSION

Made once for each version of the format, and never changed. What is derived is left out: it is made again.
"""

import asyncio
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import orjson

from streamsyn.config.loading import load
from streamsyn.daemon.daemon import open_daemon
from streamsyn.daemon.serve import bound, listening
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from tests.daemon.conftest import QUICK, SERVER, Served, seed_lines

KEY = {"Idempotency-Key": "k"}
DERIVED = shutil.ignore_patterns("*.sqlite*", "*.lock")
REQUEST = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "simulated", "messages": [{"role": "user", "content": "Why?"}]},
}


async def make_root(root: Path) -> None:
    """Runs in several states, a consumer, a file, a batch that is completed, and a server that was added."""
    simulation = Simulation(SimulatorConfig())
    servers = InProcessServers({SERVER: simulation})
    config = load(None, QUICK.items())
    async with (
        open_daemon(root, config, {}, servers.connect) as opened,
        listening(opened, await asyncio.to_thread(bound, config.serve)) as url,
        aiohttp.ClientSession(url) as session,
    ):
        daemon = Served(url, session, opened, simulation)
        await daemon.new_run("finished", labels={"team": "a"}, config={"recipe": {"target_words": 60}})
        lines = b"\n".join([*seed_lines(2), b"nix"])
        async with session.post("/v1/runs/finished/seeds", data=lines, headers=KEY) as answer:
            assert 202 == answer.status
        await daemon.ask("PUT", "/v1/runs/finished/consumers/trainer", {"kind": "samples"})
        await daemon.ask("POST", "/v1/runs/finished/close")
        await daemon.until_state("finished", "finished")
        await daemon.ask("POST", "/v1/runs/finished/consumers/trainer/ack", {"seq": 0})
        await daemon.new_run("paused", weight=2.0, priority="high")
        await daemon.ask("POST", "/v1/runs/paused/pause")
        await daemon.until_state("paused", "paused")
        await daemon.submit("paused", 2)
        await daemon.new_run("running")
        await daemon.submit("running", 1)
        await daemon.until("running", lambda run: run.rows["contexts"] == 1)
        await _batch(daemon)
        await daemon.ask("POST", "/v1/servers", {"url": "http://gpu-2:30000"})


async def _batch(daemon: Served) -> None:
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", orjson.dumps(REQUEST), filename="in.jsonl")
    async with daemon.session.post("/v1/files", data=form) as answer:
        file: dict[str, Any] = await answer.json()
    given = {"endpoint": REQUEST["url"], "completion_window": "24h", "input_file_id": file["id"]}
    batch = await daemon.ask("POST", "/v1/batches", given)
    while batch["status"] not in {"completed", "failed"}:
        await daemon.daemon.batches.change.wait()
        batch = await daemon.ask("GET", f"/v1/batches/{batch['id']}")
    assert "completed" == batch["status"], batch


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        asyncio.run(make_root(Path(folder) / "root"))
        shutil.copytree(Path(folder) / "root", sys.argv[1], ignore=DERIVED)
