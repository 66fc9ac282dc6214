import asyncio
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from streamsyn.errors import ConfigError
from streamsyn.sglang.simulator import wire
from streamsyn.sglang.simulator.config import SimulatorConfig
from streamsyn.sglang.simulator.control import Control
from streamsyn.sglang.simulator.faults import Script
from streamsyn.sglang.simulator.generation import Generation, reset
from streamsyn.sglang.simulator.simulation import Simulation

BODY_LIMIT_BYTES: Final = 256 * 2**20
BACKLOG: Final = 4096
DRAIN_S: Final = 30.0
"""What runs at SIGTERM has this long to finish."""
KILLED: Final = 137

SIMULATION: Final = web.AppKey("simulation", Simulation)
OPEN_TO_ALL: Final = ("/health", "/ready", "/metrics")
"""Paths that begin so need no key (srt/utils/auth.py)."""


def make_app(
    config: SimulatorConfig, *, script: Script | None = None, on_death: Callable[[], None] = lambda: None
) -> web.Application:
    """The simulator as an application; `running` and `serve` serve it as it is meant to be.

    Another runner must set `keepalive_timeout=config.keep_alive_s` and `handler_cancellation=True` (else a
    client that goes away leaves its request running). `on_death` is called when `die_after` strikes; all
    connections are reset then, and each new one at its first request.
    """
    simulation = Simulation(config, script, on_death)
    app = web.Application(client_max_size=BODY_LIMIT_BYTES, middlewares=[_gate(simulation)])
    app[SIMULATION] = simulation
    generation, control = Generation(simulation), Control(simulation)
    app.router.add_post("/v1/chat/completions", generation.chat)
    app.router.add_post("/generate", generation.generate)
    app.router.add_put("/generate", generation.generate)
    app.router.add_get("/v1/loads", control.loads)
    app.router.add_get("/v1/models", control.models)
    for path in ("/health", "/health_generate", "/ready"):
        app.router.add_get(path, control.health)
    for path in ("/server_info", "/get_server_info"):
        app.router.add_get(path, control.server_info)
    for path in ("/model_info", "/get_model_info"):
        app.router.add_get(path, control.model_info)
    for path in ("/tokenize", "/v1/tokenize"):
        app.router.add_post(path, control.tokenize)
    app.router.add_post("/abort_request", control.abort)
    app.router.add_get("/flush_cache", control.flush)
    app.router.add_post("/flush_cache", control.flush)
    app.router.add_get("/metrics", control.metrics)
    app.router.add_get("/simulator/stats", control.stats)
    app.router.add_post("/simulator/reset", control.reset)
    return app


def _gate(simulation: Simulation) -> Middleware:
    """What every request passes: death, counting, the key, unknown routes."""
    key = simulation.config.api_key

    @web.middleware
    async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
        if simulation.dead:
            return reset(request)
        if request.transport is not None:
            simulation.connected(request.transport)
        absent = request.match_info.http_exception
        simulation.stats.by_route["unknown" if absent else request.path] += 1
        if key is not None and not request.path.startswith(OPEN_TO_ALL) and not _has_key(request, key):
            return wire.reply({"error": "Unauthorized"}, 401)
        if absent:
            return wire.reply({"detail": absent.reason}, absent.status)
        return await handler(request)

    return gate


def _has_key(request: web.Request, key: str) -> bool:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return scheme.lower() == "bearer" and secrets.compare_digest(token.encode(), key.encode())


@dataclass(frozen=True, slots=True)
class RunningSimulator:
    """A simulator that listens at `url`."""

    url: str
    simulation: Simulation


@asynccontextmanager
async def running(
    config: SimulatorConfig,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    script: Script | None = None,
    on_death: Callable[[], None] = lambda: None,
    drain_s: float = 0.1,
) -> AsyncIterator[RunningSimulator]:
    """Serves within this event loop; port 0 picks a free one. What runs at the end has `drain_s` to finish.

    Raises:
        ConfigError: the address cannot be listened at.
    """
    app = make_app(config, script=script, on_death=on_death)
    runner = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=config.keep_alive_s,
        shutdown_timeout=drain_s,
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port, backlog=BACKLOG).start()
        except OSError as error:
            raise ConfigError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error
        bound = runner.addresses[0][1]
        shown = f"[{host}]" if ":" in host else host
        yield RunningSimulator(f"http://{shown}:{bound}", app[SIMULATION])
    finally:
        await runner.cleanup()


def serve(config: SimulatorConfig, host: str, port: int, *, script: Script | None = None) -> None:
    """Serves until SIGTERM or SIGINT, then lets what runs finish; a second signal aborts it.

    `die_after` ends the process here, as abruptly as SIGKILL would.
    """
    asyncio.run(_serve(config, host, port, script))


async def _serve(config: SimulatorConfig, host: str, port: int, script: Script | None) -> None:
    stopping = asyncio.Event()
    dying = running(config, host, port, script=script, on_death=lambda: os._exit(KILLED), drain_s=DRAIN_S)
    async with dying as server:

        def stop() -> None:
            if stopping.is_set():
                server.simulation.engine.abort_all()
            stopping.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        sys.stderr.write(f"simulating SGLang at {server.url} (model {config.model})\n")
        sys.stderr.flush()
        await stopping.wait()
