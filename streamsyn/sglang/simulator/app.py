import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from streamsyn.errors import root_cause
from streamsyn.sglang.simulator.config import SimulatorConfig
from streamsyn.sglang.simulator.connection import Door, HttpLine
from streamsyn.sglang.simulator.faults import Script
from streamsyn.sglang.simulator.line import Asked
from streamsyn.sglang.simulator.routes import Routes
from streamsyn.sglang.simulator.simulation import Simulation
from streamsyn.sglang.simulator.timeline import Timeline, playing

BODY_LIMIT_BYTES: Final = 256 * 2**20
DRAIN_S: Final = 30.0
"""What runs at SIGTERM has this long to finish."""
KILLED: Final = 137

SIMULATION: Final = web.AppKey("simulation", Simulation)


def make_app(
    config: SimulatorConfig, *, script: Script | None = None, on_death: Callable[[], None] = lambda: None
) -> web.Application:
    """The simulator as an application; `running` and `serve` serve it as it is meant to be.

    Another runner must set `keepalive_timeout=config.keep_alive_s` and `handler_cancellation=True` (else a
    client that goes away leaves its request running). `on_death` is called when `die_after` strikes; all
    connections are reset then, and each new one at its first request.
    """
    simulation = Simulation(config, script, on_death)
    routes = Routes(simulation)

    async def answer(request: web.Request) -> web.StreamResponse:
        line = HttpLine(request)
        if simulation.gone:
            line.reset()
            return line.response
        if request.transport is not None:
            simulation.connected(request.transport)
        headers = request.headers
        asked = Asked(
            request.method,
            request.path,
            request.query if request.query_string else {},
            headers.get("Authorization", ""),
            headers.get("Content-Type", ""),
            await request.read(),
        )
        await routes.serve(asked, line)
        return line.response

    app = web.Application(client_max_size=BODY_LIMIT_BYTES)
    app[SIMULATION] = simulation
    app.router.add_route("*", "/{path:.*}", answer)
    return app


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
    timeline: Timeline | None = None,
    on_death: Callable[[], None] = lambda: None,
    drain_s: float = 0.1,
) -> AsyncIterator[RunningSimulator]:
    """Serves within this event loop; port 0 picks a free one. What runs at the end has `drain_s` to finish.

    Connections are refused while it is down and once it is dead. With a timeline, errors come in a group.

    Raises:
        ConfigError: the address cannot be listened at.
    """

    def die() -> None:
        door.shut()
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
    door = Door(runner, host, port)
    try:
        await door.open()
        shown = f"[{host}]" if ":" in host else host
        async with playing(timeline, app[SIMULATION], door):
            yield RunningSimulator(f"http://{shown}:{door.port}", app[SIMULATION])
    finally:
        door.shut()
        await runner.cleanup()


def serve(
    config: SimulatorConfig,
    host: str,
    port: int,
    *,
    script: Script | None = None,
    timeline: Timeline | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then lets what runs finish; a second signal aborts it.

    Death, by `die_after` or the timeline, ends the process here, as abruptly as SIGKILL would.

    Raises:
        ConfigError: the address cannot be listened at.
    """
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
