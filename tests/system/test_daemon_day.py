"""A day of a daemon in a minute: clients, readers, batches, servers that come and go, and SIGKILLs.

STREAMSYN_DAY_KILLS makes the day longer: 3 kills by default.
"""

import asyncio
import os
import random
import signal
import socket
import subprocess
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import openai
import orjson
import psutil
import pytest

from streamsyn import follow
from tests.system.conftest import Server, assert_clean, rows, start, wait_for_line

pytestmark = pytest.mark.crash

T = TypeVar("T")
KILLS = int(os.environ.get("STREAMSYN_DAY_KILLS", "3"))
RUNS = [f"run-{n}" for n in range(5)]
CLIENTS = 8
SEEDS_A_POST = 10
POSTS = 4 * KILLS
"""Of each client."""
BATCHES, REQUESTS = 2, 30 * KILLS
CAP = 6
"""Requests in flight at one server."""
SERVERS = 4
AWAY = (aiohttp.ClientError, OSError, asyncio.TimeoutError)


class Day:
    """The daemon's process, and what its clients know."""

    def __init__(self, root: Path, servers: list[Server]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.root = root
        self.servers = servers
        self.up = asyncio.Event()
        """Set while the daemon listens."""
        self.accepted: Counter[str] = Counter()
        """Seeds accepted, by run."""
        self.all_posted = asyncio.Event()
        self.memory: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        self.last_lines: deque[bytes] = deque(maxlen=60)

    def start(self) -> None:
        """Start the daemon, and return when it listens."""
        arguments = ["serve", self.root, "--listen", f"127.0.0.1:{self.port}"]
        for server in self.servers[: SERVERS - 1]:
            arguments += ["--server", server.url]
        for key in (
            f"fleet.max_in_flight={CAP}",
            "fleet.backoff_base_s=0.02",
            "fleet.hedge_tail=false",  # a hedge asks the same thing twice on purpose
            "sink.shard_bytes=50000",
            "sink.sync_interval_s=0.05",
            "assembly.contexts_per_sample=3",
            "run.drain_timeout_s=10",
            "serve.min_free_bytes=0",
        ):
            arguments += ["--set", key]
        self._process = start(*arguments)
        wait_for_line(self._process, "daemon.listening|serving ")
        self._logging = threading.Thread(target=self.last_lines.extend, args=(self._process.stderr,))
        self._logging.start()

    def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        """End the daemon; returns its exit code."""
        assert self._process is not None
        self.memory.append(psutil.Process(self._process.pid).memory_info().rss)
        self._process.send_signal(number)
        code = self._process.wait(30)
        self._logging.join()
        assert self._process.stderr is not None
        self._process.stderr.close()
        return code

    async def ask(self, ask: Callable[[aiohttp.ClientSession], Awaitable[T]]) -> T:
        """Ask until the daemon answers."""
        while True:
            await self.up.wait()
            try:
                async with aiohttp.ClientSession(self.url) as session:
                    return await ask(session)
            except AWAY:
                await asyncio.sleep(0.02)  # it was killed: by now `up` says so

    async def json(self, method: str, path: str, body: Any = None, **given: Any) -> Any:
        """The JSON of an answer."""

        async def ask(session: aiohttp.ClientSession) -> Any:
            async with session.request(method, path, json=body, **given) as answer:
                content = await answer.read()
                assert answer.ok, (method, path, answer.status, content)
                return orjson.loads(content or b"null")

        return await self.ask(ask)


async def client(day: Day, number: int) -> None:
    """Posts seeds to all runs, each post until it is answered, with one key."""
    for post in range(POSTS):
        run = RUNS[(number + post) % len(RUNS)]
        first = (number * POSTS + post) * SEEDS_A_POST
        lines = [
            {"id": f"s{n}", "instruction": f"Who kept light {n}?", "answer": f"Keeper {n * 7919}."}
            for n in range(first, first + SEEDS_A_POST)
        ]
        body = b"".join(orjson.dumps(line) + b"\n" for line in lines)
        headers = {"Content-Type": "application/x-ndjson", "Idempotency-Key": f"{number}-{post}"}
        counts = await day.json("POST", f"/v1/runs/{run}/seeds", data=body, headers=headers)
        # What was on disk when a kill took the answer is a duplicate when it is posted again.
        assert counts["accepted"] + counts["duplicate"] == SEEDS_A_POST, counts
        day.accepted[run] += SEEDS_A_POST


async def reader(day: Day, path: str, pause_s: float, headers: dict[str, str]) -> list[int]:
    """Reads a stream to the end of the run, and takes it up after the last row whenever it is cut off."""
    seen: list[int] = []
    is_events = "Accept" in headers

    async def read(session: aiohttp.ClientSession) -> bool:
        after = f"&after={seen[-1]}" if seen else ""
        async with session.get(f"{path}?follow=1{after}", headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if is_events and line.startswith(b"event: end"):
                    return True
                text = line.removeprefix(b"data: ") if is_events else line
                if text.startswith(b"{") and text.endswith(b"}\n"):
                    seen.append(orjson.loads(text)["seq"])
                    await asyncio.sleep(pause_s)
            return not is_events

    while not await day.ask(read):
        pass
    return seen


async def consumer(day: Day, run: str, name: str, pause_s: float) -> list[int]:
    """Reads as a named consumer, which keeps its place at the daemon alone."""
    path = f"/v1/runs/{run}/consumers/{name}"
    await day.json("PUT", path, {"kind": "samples"})
    seen: list[int] = []
    acked = -1

    async def read(session: aiohttp.ClientSession) -> bool:
        nonlocal acked
        del seen[acked + 1 :]  # what was not acknowledged comes again
        async with session.get(f"/v1/runs/{run}/samples?follow=1&consumer={name}") as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if not line.endswith(b"\n"):
                    break
                seen.append(orjson.loads(line)["seq"])
                if len(seen) % 5 == 0:
                    answered = await day.json("POST", f"{path}/ack", {"seq": seen[-1]})
                    acked = answered["acked"]
                await asyncio.sleep(pause_s)
            return True

    while not await day.ask(read):
        pass
    await day.json("POST", f"{path}/ack", {"seq": seen[-1]})
    shown = await day.json("GET", path)
    assert (shown["acked"], shown["lag"]) == (seen[-1], 0)
    return seen


async def follower(day: Day, run: str) -> list[int]:
    """Reads with the library."""
    return [row["seq"] async for row in follow(f"{day.url}/v1/runs/{run}/samples", retry_s=60)]


async def batch(day: Day, number: int) -> None:
    """Drives a batch with the official client; each request has one line in its output."""
    lines = [
        {
            "custom_id": f"b{number}-{n}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "simulated", "messages": [{"role": "user", "content": f"{number} {n}?"}]},
        }
        for n in range(REQUESTS)
    ]
    async with openai.AsyncOpenAI(base_url=f"{day.url}/v1", api_key="none", max_retries=0) as api:

        async def answered(ask: Callable[[], Awaitable[T]]) -> T:
            while True:
                await day.up.wait()
                try:
                    return await ask()
                except (openai.APIConnectionError, openai.APITimeoutError):
                    await asyncio.sleep(0.02)

        content = b"".join(orjson.dumps(line) + b"\n" for line in lines)
        file = await answered(lambda: api.files.create(file=("in.jsonl", content), purpose="batch"))
        made = await answered(
            lambda: api.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
        )
        while (made := await answered(lambda: api.batches.retrieve(made.id))).status != "completed":
            assert made.status in {"validating", "in_progress", "finalizing"}, made
            await asyncio.sleep(0.1)
        output = (await answered(lambda: api.files.content(made.output_file_id or ""))).content
    answers = [orjson.loads(line) for line in output.splitlines()]
    assert Counter(one["custom_id"] for one in answers) == Counter(line["custom_id"] for line in lines)
    assert {one["response"]["status_code"] for one in answers} == {200}


async def operator(day: Day) -> None:
    """Adds, drains, kills and removes servers, and kills the daemon."""
    moments = random.Random(int(os.environ.get("STREAMSYN_DAY_SEED", "7")))
    names = [url.removeprefix("http://") for url in (server.url for server in day.servers)]
    steps: list[Callable[[], Awaitable[Any]]] = [
        lambda: day.json("POST", "/v1/servers", {"url": day.servers[-1].url}),
        lambda: day.json("POST", f"/v1/servers/{names[0]}/drain"),
        lambda: asyncio.to_thread(day.servers[1].stop, signal.SIGKILL),
    ]
    for kill in range(KILLS):
        await asyncio.sleep(moments.uniform(0.3, 1.5))
        if kill < len(steps):
            await steps[kill]()
        await asyncio.sleep(moments.uniform(0, 0.5))
        day.up.clear()
        await asyncio.to_thread(day.kill)
        await asyncio.to_thread(day.start)
        day.up.set()
    await day.json("POST", "/v1/servers", {"url": day.servers[0].url})
    await day.all_posted.wait()
    for run in RUNS:
        await day.json("POST", f"/v1/runs/{run}/close")


async def clients(day: Day) -> None:
    """All clients; then no more seeds come."""
    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(client(day, number), name=f"client {number}")
    day.all_posted.set()


@asynccontextmanager
async def begun(day: Day) -> AsyncIterator[None]:
    await asyncio.to_thread(day.start)
    day.up.set()
    for number, run in enumerate(RUNS):
        await day.json("POST", "/v1/runs", {"id": run, "weight": 1 + number})
    yield


async def live(day: Day) -> dict[str, list[int]]:
    """The day; returns what each reader has seen."""
    async with begun(day), asyncio.TaskGroup() as group:
        group.create_task(clients(day), name="clients")
        group.create_task(operator(day), name="operator")
        for number in range(BATCHES):
            group.create_task(batch(day, number), name=f"batch {number}")
        reading = {
            "run-0/contexts": reader(day, "/v1/runs/run-0/contexts", 0, {}),
            "run-1/samples": reader(day, "/v1/runs/run-1/samples", 0.01, {"Accept": "text/event-stream"}),
            "run-2/samples": reader(day, "/v1/runs/run-2/samples", 0.002, {"Accept-Encoding": "identity"}),
            "run-3/samples": follower(day, "run-3"),
            "run-4/samples": consumer(day, "run-4", "trainer", 0),
            "run-0/samples": consumer(day, "run-0", "slow", 0.01),
        }
        tasks = {name: group.create_task(one, name=name) for name, one in reading.items()}
    return {name: task.result() for name, task in tasks.items()}


@pytest.mark.timeout(60 + 30 * KILLS)
def test_a_day_in_a_minute(serve: Callable[..., Server], tmp_path: Path) -> None:
    """Each accepted seed has one outcome, each reader sees every row once, hardly anything is asked twice."""
    servers = [serve("--latency-ms", "40", "--jitter-ms", "30", "--words", "60") for _ in range(SERVERS)]
    day = Day(tmp_path / "root", servers)
    asked = 0
    stop = servers[1].stop

    def counted_stop(number: int = signal.SIGTERM) -> None:
        nonlocal asked
        asked += servers[1].stats()["requests"]
        stop(number)

    servers[1].stop = counted_stop  # type: ignore[method-assign]
    try:
        seen = asyncio.run(live(day))
        assert day.kill(signal.SIGTERM) == 0, b"".join(day.last_lines).decode()
    except BaseException:
        print(b"".join(day.last_lines).decode())
        raise
    asked += sum(server.stats()["requests"] for server in servers if server is not servers[1])

    outcomes = 0
    failed: Counter[str] = Counter()
    """Tries that outcomes tell of, besides the last one of each."""
    for run in RUNS:
        out = day.root / "runs" / run
        contexts = rows(out, "contexts")
        assert rows(out, "rejects") == []
        assert len(contexts) == len({row["seed_id"] for row in contexts}) == day.accepted[run]
        assert_clean(out)
        outcomes += len(contexts)
        failed.update(str(tried["error"]) for row in contexts for tried in row["attempts"][:-1])
    assert sum(day.accepted.values()) == CLIENTS * POSTS * SEEDS_A_POST
    for name, seqs in seen.items():
        run, kind = name.split("/")
        assert seqs == list(range(len(rows(day.root / "runs" / run, kind)))), name
    for out in (day.root / "batches").iterdir():
        assert_clean(out)
    repeated = asked - outcomes - BATCHES * REQUESTS
    print(f"{outcomes} outcomes, {repeated} requests repeated, memory {[m >> 20 for m in day.memory]} MiB")
    assert repeated <= CAP * SERVERS * KILLS + CAP, failed
    assert max(day.memory) < 2**20 * 250
