"""One server over HTTP. The only place where aiohttp's errors are seen: they become ours here."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

import aiohttp

from streamsyn.config import FleetSection
from streamsyn.errors import (
    BrokenResponse,
    ConfigError,
    ServerTimeout,
    ServerUnavailable,
)
from streamsyn.records import Completion, Request
from streamsyn.sglang import wire

KEEP_ALIVE_S = 4.0
"""Shorter than the 5 s after which an SGLang server closes an idle connection (its default)."""
_STALE_WITHIN_S = 1.0
"""A dead connection shows this soon; one that breaks later had a request at work on it."""
_CONTROL_TIMEOUT_S = 15.0
_ABORT_TIMEOUT_S = 2.0


class ServerClient:
    """Speaks to one server.

    Args:
        url: Its base URL, without a path.
        session: Used for this server alone.
        request_timeout_s: Bound on one chat request.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, request_timeout_s: float) -> None:
        self.url = url
        self._session = session
        self._request_timeout_s = request_timeout_s

    async def chat(self, request: Request, model: str, rid: str) -> Completion:
        """Ask and wait for the whole answer.

        Raises:
            ServerError: No usable answer came; the kind says what to do next.
        """
        body = wire.chat_body(request, model, rid)
        async with self._bounded(self._request_timeout_s):
            status, answer = await self._post(wire.CHAT, body)
        return wire.parse_chat(status, answer, self.url)

    async def abort(self, rid: str) -> None:
        """Have the server drop requests whose rid starts with `rid`.

        Raises:
            ServerError: It could not be told; it will find out when it writes its answer.
        """
        async with self._bounded(_ABORT_TIMEOUT_S):
            await self._post(wire.ABORT, b'{"rid":"%s"}' % rid.encode())

    async def models(self) -> list[str]:
        """What it serves, once it is healthy.

        Raises:
            ServerError: It is not up.
            ConfigError: It does not accept our key.
        """
        async with self._bounded(_CONTROL_TIMEOUT_S):
            status, body = await self._get(wire.HEALTH)
            if status not in (200, 404):  # other servers than SGLang may lack the route
                raise ServerUnavailable(f"{self.url}{wire.HEALTH} answered {status}")
            status, body = await self._get(wire.MODELS)
        if status in (401, 403):
            raise ConfigError(f"{self.url} does not accept the key (HTTP {status}); set STREAMSYN_API_KEY")
        if status != 200:
            raise wire.error_of(status, "no list of models", self.url)
        return wire.served_models(body)

    @asynccontextmanager
    async def _bounded(self, timeout_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise ServerTimeout(f"{self.url} gave no answer within {timeout_s:g} s") from None

    async def _get(self, path: str) -> tuple[int, bytes]:
        with self._translated():
            async with self._session.get(self.url + path) as response:
                return response.status, await response.read()

    async def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        with self._translated():
            started = time.monotonic()
            try:
                return await self._post_once(path, body)
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                # Gone at once and without a byte: most likely a kept-alive connection that the server
                # was just closing, which says nothing about the server. Once more, on another one.
                if time.monotonic() - started > _STALE_WITHIN_S:
                    raise
            return await self._post_once(path, body)

    async def _post_once(self, path: str, body: bytes) -> tuple[int, bytes]:
        async with self._session.post(self.url + path, data=body) as response:
            return response.status, await response.read()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except aiohttp.ClientPayloadError as error:
            raise BrokenResponse(f"{self.url} cut its answer short: {error}") from error
        except aiohttp.ConnectionTimeoutError as error:
            raise ServerUnavailable(f"{self.url} cannot be reached: {error}") from error
        except aiohttp.InvalidURL as error:
            raise ConfigError(f"{self.url} is no URL") from error
        except (aiohttp.ClientConnectionError, ConnectionError) as error:
            raise ServerUnavailable(f"{self.url} dropped or refused the connection: {error}") from error
        except aiohttp.ClientError as error:
            raise BrokenResponse(f"{self.url} speaks no proper HTTP: {error}") from error


@asynccontextmanager
async def open_session(
    fleet: FleetSection, headers: Mapping[str, str]
) -> AsyncIterator[aiohttp.ClientSession]:
    """A session for one server: as many connections as there are requests, none kept too long."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=fleet.connect_timeout_s),
        headers={"Content-Type": "application/json", **headers},
        read_bufsize=2**20,
    ) as session:
        yield session
