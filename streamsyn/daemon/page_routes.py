"""`/`: the page, its files, and `/v1/events`, the states that it shows.

A state is computed once a second for all who watch, and only while somebody does. Of throughput alone a point
is kept every ten seconds, so that a page that is opened shows the last hour.
"""

import asyncio
import shutil
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from typing import Any, Final

import orjson
from aiohttp import web

import streamsyn
from streamsyn.daemon.daemon import DAEMON, Daemon
from streamsyn.daemon.hosted_run import HostedRun
from streamsyn.daemon.route import Route
from streamsyn.daemon.server_routes import server_statuses
from streamsyn.daemon.stream_routes import WRITE_TIMEOUT_S

EVERY_S: Final = 1.0
"""Seconds between two states."""
MAX_RUNS: Final = 200
"""Runs in a state: all that have not ended, and the newest of the others up to this number."""
POINT_EVERY_S: Final = 10.0
MAX_POINTS: Final = 360
_TOKENS: Final = ("prompt", "cached", "planned_cached", "completion")
_RATES: Final = ("outcomes_per_s", "output_tokens_per_s")


class Throughput:
    """The rates of all runs together over the last hour, a point every ten seconds."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float, float]] = deque(maxlen=MAX_POINTS)

    def add(self, at: float, rates: dict[str, float]) -> None:
        """Add a point: the Unix time, and the rates."""
        self._points.append((at, rates["outcomes_per_s"], rates["output_tokens_per_s"]))

    def as_json(self) -> dict[str, Any]:
        """The points as columns."""
        return {
            "every_s": POINT_EVERY_S,
            "at": [round(at, 1) for at, _, _ in self._points],
            "outcomes_per_s": [outcomes for _, outcomes, _ in self._points],
            "output_tokens_per_s": [tokens for _, _, tokens in self._points],
        }


class PageState:
    """Makes the states that the page shows. For the daemon's event loop.

    Args:
        daemon: The daemon.
    """

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._throughput = Throughput()
        self._computing = asyncio.Lock()
        self._event = b""
        self._computed_in = -1
        """The second of the loop's clock in which the event was computed."""
        self._watching = 0
        self._shown: list[HostedRun] = []
        """Held while somebody watches, so that runs that have ended are read from disk once."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Somebody watches during the block."""
        self._watching += 1
        try:
            yield
        finally:
            self._watching -= 1
            if not self._watching:
                self._shown = []

    async def event(self) -> bytes:
        """Return the present state as a server-sent event; all who ask within one second get the same."""
        async with self._computing:
            second = int(asyncio.get_running_loop().time() / EVERY_S)
            if second != self._computed_in:
                self._event = b"event: state\ndata: " + orjson.dumps(await self._state()) + b"\n\n"
                self._computed_in = second
            return self._event

    async def record_throughput(self) -> None:
        """Add a point of throughput every ten seconds, for ever."""
        while True:
            self._throughput.add(time.time(), self._rates())
            await asyncio.sleep(POINT_EVERY_S)

    async def _state(self) -> dict[str, Any]:
        daemon = self._daemon
        runs = await self._runs()
        disk = await asyncio.to_thread(shutil.disk_usage, daemon.root)
        why = daemon.why_not_ready
        return {
            "at": time.time(),
            "version": streamsyn.__version__,
            "started_at": daemon.started_at,
            "ready": {"ok": why is None, "why": why},
            "disk": {
                "free_bytes": disk.free,
                "total_bytes": disk.total,
                "min_free_bytes": daemon.config.serve.min_free_bytes,
            },
            "rates": self._rates(),
            "history": self._throughput.as_json(),
            "states": daemon.runs.by_state(),
            "batches": daemon.batches.runs.by_state(),
            "runs": runs,
            "tokens": self._tokens(),
            "servers": server_statuses(daemon),
        }

    async def _runs(self) -> list[dict[str, Any]]:
        """The runs to show, as the API shows them: active ones first."""
        runs = self._daemon.runs
        active = runs.active
        newest, _ = await runs.page(state=None, after=None, limit=max(1, MAX_RUNS - len(active)))
        known = {run.id for run in active}
        ended = [run for run in newest if run["id"] not in known]
        self._shown = [await runs.get(run["id"]) for run in ended]
        return [run.as_json() for run in active] + ended

    def _tokens(self) -> dict[str, int]:
        """Tokens of all requests since the daemon's start, by the answers of the servers."""
        servers = self._daemon.hosting.servers.describe()
        return {name: sum(server[f"{name}_tokens"] for server in servers) for name in _TOKENS}

    def _rates(self) -> dict[str, float]:
        """The rates of all runs together, also those of batches."""
        rates = [run.rates() for run in self._daemon.hosted()]
        return {name: round(sum(one[name] for one in rates), 2) for name in _RATES}


PAGE_STATE: Final = web.AppKey("page_state", PageState)

_HEADERS: Final = {
    # https://www.w3.org/TR/CSP3/ and https://www.w3.org/TR/trusted-types/: only these files, no inline code,
    # and no text that becomes HTML.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_TYPES: Final = {
    "css": "text/css",
    "html": "text/html",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}
PAGE_FILES: Final = {
    path.name: path.read_bytes()
    for path in sorted((files("streamsyn.daemon") / "page").iterdir(), key=lambda path: path.name)
}


def set_up(app: web.Application) -> None:
    """Prepare the application: throughput is recorded from its start on."""
    daemon = app[DAEMON]
    app[PAGE_STATE] = PageState(daemon)

    async def start(app: web.Application) -> None:
        daemon.tasks.start(app[PAGE_STATE].record_throughput(), name="throughput")

    app.on_startup.append(start)


async def page_file(_request: web.Request, name: str) -> web.Response:
    """Return a file of the page."""
    return web.Response(
        body=PAGE_FILES[name], content_type=_media_type(name), charset="utf-8", headers=_HEADERS
    )


async def events(request: web.Request) -> web.StreamResponse:
    """Send a state every second until the client leaves or the daemon has ended its work."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    if request.method == "HEAD":
        return response
    daemon, state = request.app[DAEMON], request.app[PAGE_STATE]
    clock = asyncio.get_running_loop().time
    with state.watched():
        while not daemon.has_ended:
            event = await state.event()
            try:
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await response.write(event)
            except TimeoutError:  # it takes nothing: what is buffered for it is dropped, too
                if request.transport is not None:
                    request.transport.abort()
                break
            await asyncio.sleep(EVERY_S - clock() % EVERY_S)
    return response


def _media_type(name: str) -> str:
    return _TYPES[name.rpartition(".")[2]]


ROUTES: Final = (
    *(
        Route(
            method="GET",
            path="/" if name == "index.html" else f"/page/{name}",
            handler=partial(page_file, name=name),
            scope="open",
            summary="The page." if name == "index.html" else f"A file of the page: {name}.",
            answers={200: _media_type(name)},
        )
        for name in PAGE_FILES
    ),
    Route(
        method="GET",
        path="/v1/events",
        handler=events,
        scope="read",
        summary="What the page shows, as server-sent events: one `state` every second.",
        answers={200: "text/event-stream"},
    ),
)
