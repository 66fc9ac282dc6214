"""One server over HTTP. The only place where aiohttp's errors are seen: they become ours here."""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp

from streamsyn.errors import (
    BrokenResponse,
    ConfigError,
    ServerTimeout,
    ServerUnavailable,
    ServerUnreachable,
    StreamsynError,
)
from streamsyn.records import Completion, Request
from streamsyn.sglang import wire

KEEP_ALIVE_S = 4.0
"""Shorter than the 5 s after which an SGLang server closes an idle connection (its default)."""
_STALE_WITHIN_S = 1.0
"""A dead connection shows this soon; one that breaks later had a request at work on it."""
_FOREIGN = (aiohttp.ClientError, ConnectionError, TimeoutError, UnicodeError)
"""What aiohttp raises; the last one when a host name cannot be looked up at all."""
_CONTROL_TIMEOUT_S = 15.0
_ABORT_TIMEOUT_S = 2.0


class ServerClient:
    """Speaks to one server.

    Args:
        url: Its base URL, without a path.
        session: Used for this server alone.
        request_timeout_s: Bound on one chat request.
        connect_timeout_s: Bound on opening a connection.
    """

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        request_timeout_s: float,
        connect_timeout_s: float = 10.0,
    ) -> None:
        self.url = url
        self._session = session
        # aiohttp's own total costs less than asyncio.timeout; beyond 5 s it is up to a second late.
        self._request_timeout, self._control_timeout, self._abort_timeout = (
            aiohttp.ClientTimeout(total=seconds, sock_connect=connect_timeout_s)
            for seconds in (request_timeout_s, _CONTROL_TIMEOUT_S, _ABORT_TIMEOUT_S)
        )

    async def chat(self, request: Request, model: str, rid: str) -> Completion:
        """Ask and wait for the whole answer.

        Raises:
            ServerError: No usable answer came; the kind says what to do next.
        """
        body = wire.chat_body(request, model, rid)
        status, answer = await self._post(wire.CHAT, body, self._request_timeout)
        return wire.parse_chat(status, answer, self.url)

    async def abort(self, rid: str) -> None:
        """Have the server drop the request of that rid.

        Raises:
            ServerError: It could not be told; it will find out when it writes its answer.
        """
        await self._post(wire.ABORT, b'{"rid":"%s"}' % rid.encode(), self._abort_timeout)

    async def models(self) -> list[str]:
        """What it serves, once it is healthy.

        Raises:
            ServerError: It is not up.
            ConfigError: It does not accept our key.
        """
        status, body = await self._get(wire.HEALTH)
        if status in (200, 404):  # other servers than SGLang may lack the route
            status, body = await self._get(wire.MODELS)
        elif status not in (401, 403):
            raise ServerUnavailable(f"{self.url}{wire.HEALTH} answered {status}")
        if status in (401, 403):
            raise ConfigError(f"{self.url} does not accept the key (HTTP {status}); set STREAMSYN_API_KEY")
        if status != 200:
            raise wire.error_of(status, "no list of models", self.url)
        return wire.served_models(body)

    async def _get(self, path: str) -> tuple[int, bytes]:
        bound = self._control_timeout
        try:
            async with self._session.get(self.url + path, timeout=bound) as response:
                return response.status, await response.read()
        except _FOREIGN as error:
            raise self._translated(error, bound) from error

    async def _post(self, path: str, body: bytes, bound: aiohttp.ClientTimeout) -> tuple[int, bytes]:
        started = time.monotonic()
        try:
            try:
                return await self._post_once(path, body, bound)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                # Gone at once and without a byte: most likely a kept-alive connection that the server
                # was just closing, which says nothing about the server. Once more, on another one.
                late = time.monotonic() - started > _STALE_WITHIN_S
                if late or isinstance(error, aiohttp.ClientConnectorError):
                    raise
            return await self._post_once(path, body, bound)
        except _FOREIGN as error:
            raise self._translated(error, bound) from error

    async def _post_once(self, path: str, body: bytes, bound: aiohttp.ClientTimeout) -> tuple[int, bytes]:
        async with self._session.post(self.url + path, data=body, timeout=bound) as response:
            return response.status, await response.read()

    def _translated(self, error: Exception, bound: aiohttp.ClientTimeout) -> StreamsynError:
        """What aiohttp's error means to us."""
        match error:
            case aiohttp.InvalidURL() | UnicodeError():
                return ConfigError(f"{self.url} is no URL")
            case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
                return ServerUnreachable(f"{self.url} cannot be reached: {error}")
            case TimeoutError():
                return ServerTimeout(f"{self.url} gave no answer within {bound.total:g} s")
            case aiohttp.ClientPayloadError():
                return BrokenResponse(f"{self.url} cut its answer short: {error}")
            case aiohttp.ClientConnectionError() | ConnectionError():
                return ServerUnavailable(f"{self.url} dropped the connection: {error}")
            case _:
                return BrokenResponse(f"{self.url} speaks no proper HTTP: {error}")


@asynccontextmanager
async def open_session(headers: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientSession]:
    """A session for one server: as many connections as there are requests, none kept too long."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
        headers={"Content-Type": "application/json", **headers},
        read_bufsize=2**20,
    ) as session:
        yield session
