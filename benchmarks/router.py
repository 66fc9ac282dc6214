"""The Shepherd gateway (`smg`, once sglang-router) in its own process."""

import asyncio
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager

import aiohttp

from benchmarks.peers.processes import environment


@asynccontextmanager
async def router(urls: Sequence[str], *options: str) -> AsyncIterator[str]:
    """Context manager: the gateway in front of the servers; enters with its URL once all are healthy.

    It is installed in `.peers/` at the first use.
    """
    port, metrics_port = _free_ports(2)
    command = [str(environment("smg") / "bin" / "smg"), "launch", "--worker-urls", *urls, *options]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)]
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # or it asks the hub for the simulated model's tokenizer
    process = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs meanwhile
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | offline
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(60), aiohttp.ClientSession() as session:
            while await _healthy_workers(session, url) < len(urls):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


async def _healthy_workers(session: aiohttp.ClientSession, url: str) -> int:
    try:
        async with session.get(f"{url}/workers") as answer:
            body = await answer.json()
    except (aiohttp.ClientError, ConnectionError):
        return 0
    return sum(worker["is_healthy"] for worker in body["workers"])


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
