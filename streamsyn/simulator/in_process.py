"""Simulated servers in the client's process: a transport without sockets or HTTP.

Answers and counters are the same as over HTTP, byte for byte. In virtual time (`run_virtually`) a fleet of
such servers runs for days within minutes, and the same way each time.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl

from streamsyn.background import background
from streamsyn.errors import ServerTimeout, ServerUnavailable, ServerUnreachable
from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.fleet.transport import Reply, Transport
from streamsyn.simulator import protocol
from streamsyn.simulator.cpu_time import SPENT
from streamsyn.simulator.protocol import RawRequest
from streamsyn.simulator.routes import Routes
from streamsyn.simulator.simulation import Simulation
from streamsyn.simulator.timeline import Timeline
from streamsyn.simulator.virtual_time import run_virtually

T = TypeVar("T")

_STALE_WITHIN_S: Final = 1.0
"""As in HttpTransport: a connection lost within this time is tried once more."""
_OK: Final = 200
_NO_HEADERS: Final[Mapping[str, str]] = {}
_NO_QUERY: Final[Mapping[str, str]] = {}
_NO_TIMELINES: Final[Mapping[str, Timeline]] = {}


class _Call:
    """Receives an answer for a caller in the same process."""

    __slots__ = ("_on_data", "begun", "body", "broken", "retry_after_s", "status")

    def __init__(self, on_data: Callable[[], None] | None) -> None:
        self._on_data = on_data
        self.status = 200
        self.body: bytes | bytearray = b""
        self.retry_after_s: int | None = None
        self.begun = False
        """Whether the client has received a byte."""
        self.broken = False
        """Whether the connection was lost before the end of the answer."""

    async def send(self, reply: protocol.Reply) -> None:
        self.status, self.body, self.retry_after_s = reply.status, reply.body, reply.retry_after_s
        self._begin()

    async def stream(self, data: bytes) -> None:
        if not self.begun:
            self.body = bytearray()
        self.body += data
        self._begin()

    async def end(self) -> None:
        return

    async def cut(self, reply: protocol.Reply | None = None) -> None:  # noqa: ARG002 - the client does not get it
        self.begun = self.broken = True

    def reset(self) -> None:
        self.broken = True

    def _begin(self) -> None:
        if not self.begun:
            self.begun = True
            if self._on_data is not None and self.status == _OK:
                self._on_data()


class InProcessTransport:
    """A transport to a simulation in this process; see `fleet.transport.Transport`.

    Args:
        simulation: The simulated server.
        url: Its URL, for messages.
        headers: Sent with each request; the simulator reads only Authorization.
    """

    def __init__(
        self,
        simulation: Simulation,
        url: str = "http://in-process",
        headers: Mapping[str, str] = _NO_HEADERS,
    ) -> None:
        self._simulation = simulation
        self._routes = Routes(simulation)
        self._url = url
        self._authorization = headers.get("Authorization", "")

    async def exchange(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] = _NO_HEADERS,  # noqa: ARG002 - the simulator does not read them
        timeout_s: float,
        on_data: Callable[[], None] | None = None,
    ) -> Reply:
        """See Transport."""
        path, _, query = path.partition("?")
        raw = RawRequest(
            method,
            path,
            dict(parse_qsl(query)) if query else _NO_QUERY,
            self._authorization,
            protocol.JSON,
            body or b"",
        )
        clock = asyncio.get_running_loop().time
        started = clock()
        call = await self._once(raw, timeout_s, on_data)
        if call.broken and not call.begun and clock() - started <= _STALE_WITHIN_S:
            call = await self._once(raw, timeout_s, on_data)
        if call.broken and call.begun:
            raise ServerUnavailable(f"{self._url} ended its answer early")
        if call.broken:
            raise ServerUnavailable(f"{self._url} closed the connection")
        return Reply(call.status, bytes(call.body), call.retry_after_s)

    async def _once(self, raw: RawRequest, timeout_s: float, on_data: Callable[[], None] | None) -> _Call:
        if self._simulation.gone:
            raise ServerUnreachable(f"cannot connect to {self._url}: connection refused")
        call = _Call(on_data)
        try:
            async with asyncio.timeout(timeout_s):
                await SPENT.of(self._routes.serve(raw, call))
        except TimeoutError:
            raise ServerTimeout(f"{self._url} did not answer within {timeout_s:g} s") from None
        return call


class InProcessServers:
    """Many simulated servers by URL; connections to any other URL are refused.

    Args:
        simulations: The servers.
        timelines: Timelines of some of them, for `playing`.
        headers: Sent with each request.
    """

    def __init__(
        self,
        simulations: Mapping[str, Simulation],
        timelines: Mapping[str, Timeline] = _NO_TIMELINES,
        headers: Mapping[str, str] = _NO_HEADERS,
    ) -> None:
        self.simulations = simulations
        self._timelines = timelines
        self._headers = headers

    @asynccontextmanager
    async def connect(self, spec: ServerSpec) -> AsyncIterator[Transport]:
        """Open a transport to a server; for `open_fleet`."""
        simulation = self.simulations.get(spec.url)
        if simulation is None:
            yield _Unreachable(spec.url)
        else:
            yield InProcessTransport(simulation, spec.url, self._headers)

    @asynccontextmanager
    async def playing(self) -> AsyncIterator[None]:
        """Play the timelines from now to the end of the block; errors are raised in a group."""
        async with background() as tasks:
            for url, timeline in self._timelines.items():
                tasks.start(timeline.play(self.simulations[url]), name=f"timeline-{url}")
            yield

    def run(self, main: Coroutine[Any, Any, T], *, limit_s: float = math.inf) -> T:
        """Run `main` in virtual time while the timelines play; see `run_virtually`.

        Raises:
            BaseExceptionGroup: What `main` or a timeline raises.
            Deadlock: All tasks wait and no timer is set.
            OutOfTime: It takes longer than `limit_s` virtual seconds.
        """

        async def whole() -> T:
            async with self.playing():
                return await main

        return run_virtually(whole(), limit_s=limit_s)


class _Unreachable:
    """A transport to an address that refuses connections."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def exchange(self, *_: Any, **__: Any) -> Reply:
        raise ServerUnreachable(f"cannot connect to {self._url}: connection refused")
