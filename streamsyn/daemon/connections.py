"""Limits of connections: how many there may be, how long they may be silent, how often clients may ask."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from aiohttp import web

from streamsyn.config.command_sections import ServeSection

_FULL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: 85\r\n\r\n"
    b'{"title":"Service Unavailable","status":503,"detail":"too many open connections now"}'
)
_MAX_CLIENTS: Final = 10_000
"""Clients whose rates are remembered."""


class Connections:
    """Makes the protocol of each connection; for `create_server`.

    aiohttp closes a connection that is idle between requests; here it is one that never completes its first.

    Args:
        limits: Returns the section with the limits as they are now.

    Attributes:
        server: Makes protocols for HTTP; set before the first connection.
    """

    server: web.Server

    def __init__(self, limits: Callable[[], ServeSection]) -> None:
        self._limits = limits
        self._silent: dict[asyncio.BaseProtocol, asyncio.TimerHandle] = {}

    def __call__(self) -> asyncio.BaseProtocol:
        limits = self._limits()
        if len(self.server.connections) >= limits.max_connections:
            return _Full()
        protocol = self.server()
        loop = asyncio.get_running_loop()
        self._silent[protocol] = loop.call_later(limits.body_timeout_s, self._close, protocol)
        return protocol

    def spoke(self, request: web.Request) -> None:
        """Note that a connection has sent a whole request."""
        timer = self._silent.pop(request.protocol, None)
        if timer is not None:
            timer.cancel()

    def _close(self, protocol: web.RequestHandler) -> None:
        self._silent.pop(protocol, None)
        if protocol.transport is not None:
            protocol.transport.abort()


class _Full(asyncio.Protocol):
    """Answers a connection that is one too many, and closes it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(_FULL)
        transport.close()


class RateLimit:
    """Decides which requests come too fast, by a token bucket for each client that holds those of a second.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """For each client, least recent first: what its bucket held, and when."""

    def wait_s(self, client: str, per_s: float) -> float:
        """Count a request; returns the seconds to wait before it is allowed: 0 if it is now.

        Args:
            client: Who asks.
            per_s: Requests per second that are allowed.
        """
        now, most = self._clock(), max(1.0, per_s)
        held, then = self._buckets.pop(client, (most, now))
        held = min(most, held + (now - then) * per_s)
        is_allowed = held >= 1
        self._buckets[client] = (held - 1 if is_allowed else held), now
        if len(self._buckets) > _MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if is_allowed else (1 - held) / per_s
