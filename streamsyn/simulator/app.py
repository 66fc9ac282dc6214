"""The simulator over HTTP: one aiohttp application, served in this event loop or as a process."""

import asyncio
import os
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from streamsyn.errors import ConfigError, root_cause
from streamsyn.io.process_files import raise_limit
from streamsyn.simulator.protocol import RawRequest, Reply
from streamsyn.simulator.routes import Routes
from streamsyn.simulator.settings import Script, SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.simulator.timeline import Timeline, playing

NO_LINGER: Final = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: closing sends a reset."""
BACKLOG: Final = 4096


class HttpResponseWriter:
    """Writes the answer over HTTP; `response` is what the request handler returns to aiohttp."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response: web.StreamResponse = web.Response()

    async def send(self, reply: Reply) -> None:
        headers = {"Content-Type": reply.content_type} if reply.content_type else {}
        if reply.retry_after_s is not None:
            headers["Retry-After"] = str(reply.retry_after_s)
        self.response = web.Response(status=reply.status, body=reply.body, headers=headers)
        await self.response.prepare(self._request)
        await self.response.write_eof()

    async def stream(self, data: bytes) -> None:
        await self._begin()
        await self.response.write(data)

    async def end(self) -> None:
        await self.response.write_eof()

    async def cut(self, reply: Reply | None = None) -> None:
        if reply is not None:
            self.response = web.StreamResponse(headers={"Content-Type": reply.content_type or ""})
            self.response.content_length = len(reply.body)
            await self.response.prepare(self._request)
            await self.response.write(reply.body[: len(reply.body) // 2])
        await self._begin()
        if self._request.transport is not None:
            self._request.transport.close()

    def reset(self) -> None:
        transport = self._request.transport
        if transport is not None and not transport.is_closing():
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            transport.abort()

    async def _begin(self) -> None:
        if not self.response.prepared:
            headers = {"Content-Type": "text/event-stream; charset=utf-8"}
            self.response = web.StreamResponse(headers=headers)
            await self.response.prepare(self._request)


class Listener:
    """Listens at the server's address; while it is closed, connections are refused.

    Args:
        runner: Serves the connections; already set up.
        host: Host to listen at.
        port: 0 picks a free one, which is kept when it opens again.
    """

    def __init__(self, runner: web.AppRunner, host: str, port: int) -> None:
        self._runner = runner
        self._host = host
        self.port = port
        self._listening: asyncio.Server | None = None

    async def open(self) -> None:
        """Start to listen.

        Raises:
            ConfigError: The address is in use, or not an address of this machine.
        """
        assert self._runner.server is not None
        try:
            self._listening = await asyncio.get_running_loop().create_server(
                self._runner.server, self._host, self.port, backlog=BACKLOG
            )
        except OSError as error:
            message = f"cannot listen at {self._host}:{self.port}: {error.strerror or error}"
            raise ConfigError(message) from error
        self.port = self._listening.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Stop listening; existing connections stay open."""
        if self._listening is None:
            return
        loop = asyncio.get_running_loop()
        for listener in self._listening.sockets:
            loop.remove_reader(listener.fileno())
        # A connection that was just accepted is set up in this turn of the loop, and fails if its server is
        # closed before.
        loop.call_soon(self._listening.close)
        self._listening = None


BODY_LIMIT_BYTES: Final = 256 * 2**20
DRAIN_S: Final = 30.0
"""Time that running requests have to finish after SIGTERM."""
KILLED: Final = 137

SIMULATION: Final = web.AppKey("simulation", Simulation)


def make_app(
    config: SimulatorConfig, *, script: Script | None = None, on_death: Callable[[], None] = lambda: None
) -> web.Application:
    """Return the simulator as an aiohttp application; use `running` or `serve` to serve it.

    Any other runner must set `keepalive_timeout=config.keep_alive_s` and `handler_cancellation=True`;
    otherwise a request continues after its client has disconnected. `on_death` is called when the server
    dies; then all connections are reset, and each new one at its first request.
    """
    simulation = Simulation(config, script, on_death)
    routes = Routes(simulation)

    async def answer(request: web.Request) -> web.StreamResponse:
        writer = HttpResponseWriter(request)
        if simulation.gone:
            writer.reset()
            return writer.response
        if request.transport is not None:
            simulation.connected(request.transport)
        headers = request.headers
        raw = RawRequest(
            request.method,
            request.path,
            request.query if request.query_string else {},
            headers.get("Authorization", ""),
            headers.get("Content-Type", ""),
            await request.read(),
        )
        await routes.serve(raw, writer)
        return writer.response

    app = web.Application(client_max_size=BODY_LIMIT_BYTES)
    app[SIMULATION] = simulation
    app.router.add_route("*", "/{path:.*}", answer)
    return app


@dataclass(frozen=True, slots=True)
class RunningSimulator:
    """A simulator that listens at `url`, and its state."""

    url: str
    simulation: Simulation


@asynccontextmanager
async def running(
    config: SimulatorConfig,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    script: Script | None = None,
    timeline: Timeline | None = None,
    on_death: Callable[[], None] = lambda: None,
    drain_s: float = 0.1,
) -> AsyncIterator[RunningSimulator]:
    """Serve in this event loop; port 0 picks a free one. At the end, requests have `drain_s` to finish.

    Connections are refused while the server is down or dead. With a timeline, errors are raised in a group.

    Raises:
        ConfigError: It cannot listen at the address.
    """

    def die() -> None:
        listener.close()
        on_death()

    app = make_app(config, script=script, on_death=die)
    runner = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=config.keep_alive_s,
        shutdown_timeout=drain_s,
    )
    await runner.setup()
    listener = Listener(runner, host, port)
    try:
        await listener.open()
        shown = f"[{host}]" if ":" in host else host
        async with playing(timeline, app[SIMULATION], listener):
            yield RunningSimulator(f"http://{shown}:{listener.port}", app[SIMULATION])
    finally:
        listener.close()
        await runner.cleanup()


def serve(
    config: SimulatorConfig,
    host: str,
    port: int,
    *,
    script: Script | None = None,
    timeline: Timeline | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then let requests finish; a second signal aborts them.

    When the server dies, by `die_after` or the timeline, the process exits at once, as if by SIGKILL.

    Raises:
        ConfigError: It cannot listen at the address.
    """
    raise_limit()
    try:
        asyncio.run(_serve(config, host, port, script, timeline))
    except BaseExceptionGroup as group:
        raise root_cause(group) from None


async def _serve(
    config: SimulatorConfig, host: str, port: int, script: Script | None, timeline: Timeline | None
) -> None:
    stopping = asyncio.Event()
    async with running(
        config,
        host,
        port,
        script=script,
        timeline=timeline,
        on_death=lambda: os._exit(KILLED),
        drain_s=DRAIN_S,
    ) as server:

        def stop() -> None:
            if stopping.is_set():
                server.simulation.engine.abort_all()
            stopping.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        sys.stderr.write(f"simulating SGLang at {server.url} (model {config.model})\n")
        sys.stderr.flush()
        await stopping.wait()
