"""What the daemon's streams cost: rows to 1, 10 and 1,000 readers, slow readers, idle connections.

    python -m benchmarks.daemon_streams readers        rows to N readers, beside a bare aiohttp handler
    python -m benchmarks.daemon_streams live           rows to N readers as they are written, 1,000 a second
    python -m benchmarks.daemon_streams slow           memory of readers that take nothing
    python -m benchmarks.daemon_streams idle           memory and CPU of connections that wait for rows

The daemon (or the bare handler, which writes the same bytes from memory, 128 KiB at a time) is a process of
its own on one core; the readers are one process on another. CPU is that of the server's process. Rates are
per second of its CPU, so that a busy machine does not change them much.
"""

import argparse
import asyncio
import os
import re
import resource
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import psutil
from aiohttp import web

from streamsyn.config.loading import load
from streamsyn.config.sections import SinkSection
from streamsyn.daemon.daemon import open_daemon
from streamsyn.daemon.root import opened_root
from streamsyn.daemon.run_record import Figures, RunRecord, State
from streamsyn.daemon.serve import bound, listening
from streamsyn.records import Sample
from streamsyn.sink.log import RunLog
from streamsyn.sink.rundir import RunDirectory
from streamsyn.telemetry import configure_logs

WORDS = ("keeper", "light", "wrote", "wind", "water", "while", "ships", "passed", "harbour", "long", "nights")
PIECE_BYTES = 128 * 2**10
_PLAIN = "Accept-Encoding: identity"
_EVENTS = "Accept: text/event-stream"
_OLD_ROWS, _NEW_ROWS = 100, 2000
PATH = "/v1/runs/r/samples"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["readers", "live", "slow", "idle", "serve"])
    parser.add_argument("--row-bytes", type=int, default=4096)
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 10, 1000])
    parser.add_argument("--connections", type=int, default=10_000, help="connections of `idle`")
    parser.add_argument("--root", type=Path, help="of `serve`, which the others start")
    parser.add_argument("--write-for", type=int, help="write rows once this many readers wait for them")
    parser.add_argument("--bare", action="store_true", help="serve the bare handler")
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0)) if args.what == "serve" else 0})
    match args.what:
        case "readers":
            readers(args.readers, args.row_bytes)
        case "live":
            live(args.readers, args.row_bytes)
        case "slow":
            slow(args.row_bytes)
        case "idle":
            idle(args.connections)
        case _:
            asyncio.run(bare(args.root) if args.bare else serve(args.root, args.write_for, args.row_bytes))


def readers(numbers: list[int], row_bytes: int) -> None:
    """Rows to N readers that read a run from its first row to its end."""
    print(f"{'readers':>8}{'':>12}{'rows':>12}{'CPU s':>8}{'rows/s of CPU':>15}{'MB/s':>8}{'peak MiB':>10}")
    for number in numbers:
        rows = 20_000 if number < 100 else 1000
        with tempfile.TemporaryDirectory() as folder:
            make_root(Path(folder), rows, row_bytes)
            for name in ("bare", "NDJSON", "events", "gzip", "zstd"):
                options = ["--bare"] if name == "bare" else []
                headers = {"events": _EVENTS}.get(name, f"Accept-Encoding: {name}")
                with served(Path(folder), *options) as (process, port):
                    before = cpu_s(process)
                    received = read_all(port, number, headers)
                    used = cpu_s(process) - before
                    print(
                        f"{number:8,}{name:>12}{number * rows:12,}{used:8.2f}{number * rows / used:15,.0f}"
                        f"{received / used / 1e6:8,.0f}{process.memory_info().rss / 2**20:10.0f}",
                        flush=True,
                    )


def live(numbers: list[int], row_bytes: int) -> None:
    """Rows to N readers that wait for each row."""
    print(f"{'readers':>8}{'rows':>12}{'seconds':>9}{'CPU s':>8}{'rows/s of CPU':>15}{'peak MiB':>10}")
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            make_root(Path(folder), _OLD_ROWS, row_bytes, state="paused")
            options = ["--write-for", str(number), "--row-bytes", str(row_bytes)]
            with served(Path(folder), *options) as (process, port):
                before, began = cpu_s(process), time.perf_counter()
                query = f"?follow=1&after={_OLD_ROWS - 1}&limit={_NEW_ROWS}"
                read_all(port, number, _PLAIN, query)
                wall, used = time.perf_counter() - began, cpu_s(process) - before
                rows, peak = number * _NEW_ROWS, process.memory_info().rss / 2**20
                print(
                    f"{number:8,}{rows:12,}{wall:9.1f}{used:8.2f}{rows / used:15,.0f}{peak:10.0f}", flush=True
                )


def slow(row_bytes: int) -> None:
    """Memory of readers that take nothing, of a run that is much longer than what a socket holds."""
    with tempfile.TemporaryDirectory() as folder:
        make_root(Path(folder), 200 * 2**20 // row_bytes, row_bytes)
        with served(Path(folder)) as (process, port):
            read_all(port, 1, _PLAIN)
            before = process.memory_info().rss
            for number in (100, 1000):
                open_ones = [connect(port, _PLAIN) for _ in range(number)]
                time.sleep(5)
                more = process.memory_info().rss - before
                print(f"{number:,} readers that take nothing: {more / number / 1024:.0f} KiB each")
                for one in open_ones:
                    one.close()


def idle(number: int) -> None:
    """Memory and CPU of connections that wait for the next row of a run that does not go on."""
    with tempfile.TemporaryDirectory() as folder:
        make_root(Path(folder), _OLD_ROWS, 4096, state="paused")
        with served(Path(folder)) as (process, port):
            read_all(port, 1, _PLAIN)
            before, began = process.memory_info().rss, cpu_s(process)
            open_ones = [connect(port, _EVENTS, f"?follow=1&after={_OLD_ROWS - 1}") for _ in range(number)]
            connected = cpu_s(process) - began
            time.sleep(5)
            more, began = process.memory_info().rss - before, cpu_s(process)
            time.sleep(30)
            share = (cpu_s(process) - began) / 30
            each = more / number / 1024
            print(f"{number:,} connections: {each:.1f} KiB each, {connected:.1f} s of CPU to accept")
            print(f"while they wait, with a heartbeat each 15 s: {share:.1%} of a core")
            for one in open_ones:
                one.close()


def make_root(root: Path, rows: int, row_bytes: int, state: State = "finished") -> None:
    """A daemon's directory with one run."""
    with opened_root(root):
        folder = root / "runs" / "r"
    RunDirectory(folder).close()
    log, rng = RunLog(folder, SinkSection()), Random(0)
    for first in range(0, rows, 64):
        log.samples.append([sample(n, row_bytes, rng) for n in range(first, min(rows, first + 64))])
    log.finish()
    log.close()
    record = RunRecord(
        id="r", created_at=1.0, state=state, is_closed=True, figures=Figures(rows={"samples": rows})
    )
    record.save(folder)


def sample(number: int, row_bytes: int, rng: Random) -> Sample:
    text = " ".join(rng.choices(WORDS, k=row_bytes // 6))
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "Keeper 7."}]
    return Sample(
        id=f"s{number}",
        seed_id=f"s{number}",
        task="qa",
        instruction="Who?",
        messages=messages,
        context_seqs=[number],
        relevant_index=0,
        n_tokens=row_bytes // 6,
    )


@contextmanager
def served(root: Path, *options: str) -> Iterator[tuple[psutil.Process, int]]:
    """A server of `root` in a process of its own; yields the process and the port."""
    command = [sys.executable, "-m", "benchmarks.daemon_streams", "serve", "--root", str(root), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r":(\d+)$", process.stdout.readline().strip())
        assert found is not None
        yield psutil.Process(process.pid), int(found[1])
    finally:
        process.kill()
        process.wait()


async def serve(root: Path, write_for: int | None, row_bytes: int) -> None:
    """The daemon, without servers; `write_for` readers of its run get new rows once they wait for them."""
    configure_logs(as_json=False)
    keys = {"serve.listen": "127.0.0.1:0", "serve.max_connections": 50_000, "serve.requests_per_s": 1e6}
    config = load(None, keys.items())
    async with open_daemon(root, config, {}) as daemon, listening(daemon, bound(config.serve)) as url:
        print(url, flush=True)
        if write_for is not None:
            run = await daemon.runs.get("r")
            streams = daemon.hosting.streams
            await asyncio.to_thread(lambda: wait_until(lambda: streams.readers >= write_for))
            await asyncio.to_thread(write_rows, run.root, row_bytes, run.tails.on_rows)
        await asyncio.Event().wait()


def wait_until(holds: Callable[[], bool]) -> None:
    while not holds():
        time.sleep(0.05)


def write_rows(root: Path, row_bytes: int, on_rows: Callable[[str, int], None]) -> None:
    """Write 1,000 rows a second, ten at a time."""
    log, rng = RunLog(root, SinkSection(), on_rows), Random(1)
    for first in range(_OLD_ROWS, _OLD_ROWS + _NEW_ROWS, 10):
        log.samples.append([sample(n, row_bytes, rng) for n in range(first, first + 10)])
        time.sleep(0.01)
    log.close()


async def bare(root: Path) -> None:
    """A handler that writes the same bytes from memory."""
    shards = sorted((root / "runs" / "r" / "samples").glob("part-*"))
    data = b"".join(path.read_bytes() for path in shards)
    pieces = [data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)]

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        return response

    app = web.Application()
    app.router.add_get(PATH, handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def connect(port: int, header: str, query: str = "") -> socket.socket:
    """A connection that has sent its request."""
    one = socket.create_connection(("127.0.0.1", port))
    one.sendall(
        f"GET {PATH}{query} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{header}\r\n\r\n".encode()
    )
    return one


def read_all(port: int, number: int, header: str, query: str = "") -> int:
    """Read with `number` connections to the end; returns the bytes received."""
    selector, buffer, received = selectors.DefaultSelector(), bytearray(2**20), 0
    for _ in range(number):
        one = connect(port, header, query)
        one.setblocking(False)
        selector.register(one, selectors.EVENT_READ, one)
    left = number
    while left:
        for key, _ in selector.select():
            got = key.data.recv_into(buffer)
            received += got
            if not got:
                selector.unregister(key.data)
                key.data.close()
                left -= 1
    assert received > number * PIECE_BYTES, "the server did not answer with rows"
    return received


if __name__ == "__main__":
    main()
