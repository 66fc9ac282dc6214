"""A small server that answers for one run as the daemon does, and fails when told to."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

from streamsyn.following.daemon_client import LoopThread


@dataclass
class RunServer:
    """Rows of samples that are there by now, and what to do with requests.

    Attributes:
        rows: The rows.
        contexts: The texts of contexts.
        state: The run's state.
        created_at: Identifies the run.
        token: What requests must have; None lets all in.
        lose_after: Connections are lost after these numbers of rows, one after the other.
        refuse: Statuses of the next answers.
        asked: Requests by path.
        firsts: First rows that streams were asked for.
        open_streams: Streams that are being sent.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    contexts: list[str] = field(default_factory=list)
    state: str = "running"
    created_at: float = 1.0
    token: str | None = None
    lose_after: list[int] = field(default_factory=list)
    refuse: list[int] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    firsts: list[int] = field(default_factory=list)
    open_streams: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self._changed = asyncio.Event()
        self.waiting = threading.Event()
        """Set when a stream waits for rows."""

    def write(self, number: int, *, state: str | None = None) -> None:
        """Add rows, from any thread."""
        self.rows += [row(len(self.rows) + at) for at in range(number)]
        self.set(state=state or self.state)

    def set(self, **given: Any) -> None:
        """Change attributes, from any thread."""
        for name, value in given.items():
            setattr(self, name, value)
        self._loop.call_soon_threadsafe(self._changed.set)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serve in this loop."""
        self._loop = asyncio.get_running_loop()
        app = web.Application()
        app.router.add_get("/v1/runs/one", self._describe)
        app.router.add_get("/v1/runs/one/samples", self._stream)
        app.router.add_get("/v1/runs/one/contexts", self._contexts)
        runner = web.AppRunner(app, shutdown_timeout=0.01, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}/v1/runs/one"
        try:
            yield
        finally:
            await runner.cleanup()

    async def _describe(self, request: web.Request) -> web.Response:
        if refusal := self._refusal(request):
            return refusal
        last = len(self.rows) - 1 if self.rows else None
        run = {"id": "one", "state": self.state, "created_at": self.created_at, "error": "disk full"}
        return web.json_response({**run, "last": {"samples": last}})

    async def _contexts(self, request: web.Request) -> web.Response:
        if refusal := self._refusal(request):
            return refusal
        at = int(request.query.get("after", -1)) + 1
        some = self.contexts[at : at + int(request.query["limit"])]
        rows = (orjson.dumps({"seq": seq, "context": one}) + b"\n" for seq, one in enumerate(some, at))
        return web.Response(body=b"".join(rows), content_type="application/x-ndjson")

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        if refusal := self._refusal(request):
            return refusal
        created_at = self.created_at
        at = int(request.query.get("after", -1)) + 1
        end = at + int(request.query.get("limit", 10**9))
        self.firsts.append(at)
        lose_at = at + self.lose_after.pop(0) if self.lose_after else None
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        self.open_streams += 1
        try:
            while at < end:
                if created_at != self.created_at or (lose_at is not None and at >= lose_at):
                    await response.write(orjson.dumps(row(at))[:20])
                    assert request.transport is not None
                    request.transport.close()
                    return response
                if at < len(self.rows):
                    await response.write(orjson.dumps(self.rows[at]) + b"\n")
                    at += 1
                elif "follow" not in request.query or self.state in {"finished", "failed"}:
                    break
                else:
                    self._changed.clear()
                    self.waiting.set()
                    await self._changed.wait()
        finally:
            self.open_streams -= 1
        return response

    def _refusal(self, request: web.Request) -> web.Response | None:
        self.asked[request.path] += 1
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"detail": "unknown token"}, status=401)
        if self.refuse:
            return web.json_response({"title": "Odd", "detail": "not now"}, status=self.refuse.pop(0))
        return None


def row(number: int) -> dict[str, Any]:
    """A row of samples."""
    messages = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "!"}]
    return {"seq": number, "id": f"id-{number}", "messages": messages}


@contextmanager
def in_thread(server: RunServer) -> Iterator[RunServer]:
    """Serve in a thread of its own, for callers that block."""
    thread = LoopThread(server.serving(), "run-server")
    try:
        thread.submit(asyncio.sleep(0)).result()
        yield server
    finally:
        thread.close()
