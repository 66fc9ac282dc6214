"""What the daemon's acceptance of seeds costs, beside a bare aiohttp handler that reads and counts lines.

    python -m benchmarks.daemon_load                     bodies of 1, 100 and 50,000 seeds
    python -m benchmarks.daemon_load --seeds 3000000     one long body: rate and memory as the index grows

The daemon is a process of its own on one core, with a run that is paused; the clients are one process on
another. Each seed is parsed, compared with all before it, written and synced before the answer. Rates are per
second of the server's CPU, so that a busy machine does not change them much; wall-clock rates are beside.
"""

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil
from aiohttp import web

from streamsyn.config.loading import load
from streamsyn.daemon.daemon import open_daemon
from streamsyn.daemon.serve import bound, listening
from streamsyn.telemetry import configure_logs

ANSWER = "Because the keeper of the light wrote down each ship that passed the harbour at night. " * 2
PIECE_SEEDS = 500


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, help="send one body of this many seeds")
    parser.add_argument("--clients", type=int, default=8, help="requests at a time, for bodies of 1 and 100")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0)) if args.serve else 0})
    if args.serve:
        asyncio.run(bare() if args.bare else serve(args.serve))
    elif args.seeds:
        grow(args.seeds)
    else:
        compare(args.clients)


def compare(clients: int) -> None:
    """Bodies of several sizes, each to a new daemon and to the bare handler."""
    columns = ("seeds a body", "server", "seeds", "CPU s", "a CPU s", "wall", "peak MiB")
    print("".join(f"{column:>13}" for column in columns))
    for each, total, at_a_time in ((1, 3000, clients), (100, 60_000, clients), (50_000, 200_000, 1)):
        for name in ("bare", "daemon"):
            with tempfile.TemporaryDirectory() as folder, served(Path(folder), name) as (process, url):
                used, wall = asyncio.run(post_all(url, process, total, each, at_a_time))
                peak = process.memory_info().rss / 2**20
            figures = (f"{used:.2f}", f"{total / used:,.0f}", f"{total / wall:,.0f}", f"{peak:.0f}")
            row = (f"{each:,}", name, f"{total:,}", *figures)
            print("".join(f"{cell:>13}" for cell in row), flush=True)


def grow(total: int) -> None:
    """One body; the rate and the memory at each tenth."""
    print(f"{'seeds':>12}{'seeds/s of CPU':>16}{'wall':>9}{'MiB':>8}")
    with tempfile.TemporaryDirectory() as folder, served(Path(folder), "daemon") as (process, url):
        step = total // 10
        for first in range(0, step * 10, step):
            used, wall = asyncio.run(post_all(url, process, step, step, 1, first, new=first == 0))
            rss = process.memory_info().rss / 2**20
            print(f"{first + step:12,}{step / used:16,.0f}{step / wall:9,.0f}{rss:8.0f}", flush=True)


async def post_all(
    url: str,
    process: psutil.Process,
    total: int,
    each: int,
    at_a_time: int,
    first: int = 0,
    *,
    new: bool = True,
) -> tuple[float, float]:
    """Post `total` seeds in bodies of `each`; returns CPU and wall-clock seconds."""
    bodies = iter(range(first, first + total, each))
    async with aiohttp.ClientSession(url) as session:

        async def client() -> None:
            for begin in bodies:
                async with session.post("/v1/runs/r/seeds", data=pieces(begin, each)) as answer:
                    assert {"accepted": each} == {"accepted": (await answer.json())["accepted"]}

        if new:
            for path, body in (("/v1/runs", {"id": "r"}), ("/v1/runs/r/pause", None)):
                async with session.post(path, json=body) as answer:
                    assert answer.status < 300
        before, begun = cpu_s(process), time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(at_a_time):
                group.create_task(client(), name=f"client {number}")
        return cpu_s(process) - before, time.perf_counter() - begun


async def pieces(first: int, number: int) -> AsyncIterator[bytes]:
    """A body, made as it is sent."""
    for begin in range(first, first + number, PIECE_SEEDS):
        yield b"".join(seed(n) for n in range(begin, min(begin + PIECE_SEEDS, first + number)))


def seed(number: int) -> bytes:
    row = {"instruction": f"What did keeper {number} write, and why?", "answer": f"{number}: {ANSWER}"}
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def served(root: Path, name: str) -> Iterator[tuple[psutil.Process, str]]:
    """A server in a process of its own; yields the process and its URL."""
    command = [sys.executable, "-m", "benchmarks.daemon_load", "--serve", str(root)]
    command += ["--bare"] if name == "bare" else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None
        yield psutil.Process(process.pid), found[0]
    finally:
        process.kill()
        process.wait()


async def serve(root: Path) -> None:
    """The daemon, without servers."""
    configure_logs(as_json=False)
    keys = {"serve.listen": "127.0.0.1:0", "serve.requests_per_s": 1e6, "serve.max_body_bytes": 2**40}
    config = load(None, keys.items())
    address = await asyncio.to_thread(bound, config.serve)
    async with open_daemon(root / "root", config, {}) as daemon, listening(daemon, address) as url:
        print(url, flush=True)
        await asyncio.Event().wait()


async def bare() -> None:
    """A handler that reads the body and counts its lines."""

    async def handler(request: web.Request) -> web.Response:
        lines = 0
        async for piece in request.content.iter_any():
            lines += piece.count(b"\n")
        return web.json_response({"accepted": lines})

    app = web.Application()
    app.router.add_post("/{path:.*}", handler)
    runner: Any = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    main()
