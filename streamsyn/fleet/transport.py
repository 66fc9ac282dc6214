"""Which https servers are trusted, and who we are to them.

How a request reaches a server: over HTTP here; the simulator has one that stays in the process.

The only place where aiohttp's errors are seen: they become ours.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import aiohttp

from streamsyn.config.sections import FleetSection
from streamsyn.errors import (
    BrokenResponse,
    ConfigError,
    ServerTimeout,
    ServerUnavailable,
    ServerUnreachable,
    StreamsynError,
)

KEY_VARIABLE = "STREAMSYN_API_KEY"
"""Environment variable of the key for servers that name no other."""


def tls_context(section: FleetSection) -> ssl.SSLContext | None:
    """What `fleet.tls_ca` and `fleet.tls_cert` say; None when neither is set: the system's way.

    Reads files: to be called before the event loop runs, or in a thread.

    Raises:
        ConfigError: A file cannot be read, or does not hold what it should.
    """
    if section.tls_ca is None and section.tls_cert is None:
        return None
    context = _trusting(section.tls_ca)
    context.set_alpn_protocols(["http/1.1"])  # as aiohttp's own do
    if section.tls_cert is not None:
        _identify(context, section.tls_cert)
    return context


def _trusting(authorities: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=authorities)
    except ssl.SSLError as error:
        raise ConfigError(
            f"fleet.tls_ca: {authorities} holds no PEM certificates ({error.reason})"
        ) from error
    except OSError as error:
        raise ConfigError(f"fleet.tls_ca: cannot read {authorities}: {error.strerror}") from error


def _identify(context: ssl.SSLContext, certificate: Path) -> None:
    try:
        # Without a password of ours OpenSSL would ask for one at the terminal.
        context.load_cert_chain(certificate, password="")
    except ssl.SSLError as error:
        raise ConfigError(
            f"fleet.tls_cert: {certificate} must hold a PEM certificate and its key, without a pass phrase"
            f"{_why(error)}"
        ) from error
    except OSError as error:
        raise ConfigError(f"fleet.tls_cert: cannot read {certificate}: {error.strerror}") from error


def _why(error: ssl.SSLError) -> str:
    """OpenSSL's reason, where it has one."""
    return f" ({error.reason})" if error.reason else ""


KEEP_ALIVE_S = 4.0
"""Shorter than the 5 s after which an SGLang server closes an idle connection (its default)."""
_STALE_WITHIN_S = 1.0
"""A dead connection shows this soon; one that breaks later had a request at work on it."""
_FOREIGN = (aiohttp.ClientError, ConnectionError, TimeoutError, UnicodeError)
"""What aiohttp raises; the last one when a host name cannot be looked up at all."""
_OK = 200
_NO_HEADERS: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: its status and its whole body."""

    status: int
    body: bytes


class Transport(Protocol):
    """Carries requests to one server."""

    async def exchange(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] = _NO_HEADERS,
        timeout_s: float,
        on_data: Callable[[], None] | None = None,
    ) -> Reply:
        """Ask, and wait for the whole answer; `on_data` is called when the first byte of a good one has come.

        Raises:
            ServerError: No answer came; the kind says what to do next.
        """
        ...


class HttpTransport:
    """Over HTTP, on connections that are kept.

    Args:
        url: The server's base URL, without a path.
        session: Used for this server alone.
        connect_timeout_s: Bound on opening a connection.
        server_name: Name that its certificate is checked against, where that is not the URL's.
    """

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        connect_timeout_s: float = 10.0,
        server_name: str | None = None,
    ) -> None:
        self._url = url
        self._session = session
        self._connect_timeout_s = connect_timeout_s
        self._server_name = server_name
        self._timeouts: dict[float, aiohttp.ClientTimeout] = {}

    async def exchange(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] = _NO_HEADERS,
        timeout_s: float,
        on_data: Callable[[], None] | None = None,
    ) -> Reply:
        """See Transport.

        A connection that is gone at once and without a byte is most likely a kept-alive one that the
        server was just closing, which says nothing about the server: once more, on another one.
        """
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            try:
                return await self._once(method, path, body, headers, timeout_s, on_data)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                late = clock() - started > _STALE_WITHIN_S
                if late or isinstance(error, aiohttp.ClientConnectorError):
                    raise
            return await self._once(method, path, body, headers, timeout_s, on_data)
        except _FOREIGN as error:
            raise self._translated(error, timeout_s) from error

    async def _once(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        timeout_s: float,
        on_data: Callable[[], None] | None,
    ) -> Reply:
        # aiohttp's own total costs less than asyncio.timeout; beyond 5 s it is up to a second late.
        timeout = self._timeouts.get(timeout_s)
        if timeout is None:
            timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=self._connect_timeout_s)
            self._timeouts[timeout_s] = timeout
        url = self._url + path
        async with self._session.request(
            method, url, data=body, headers=headers, timeout=timeout, server_hostname=self._server_name
        ) as answer:
            if on_data is None:
                return Reply(answer.status, await answer.read())
            whole = bytearray(await answer.content.readany())
            if answer.status == _OK:  # a refusal is no first token
                on_data()
            whole += await answer.content.read()
            return Reply(answer.status, bytes(whole))

    def _translated(self, error: Exception, timeout_s: float) -> StreamsynError:
        """What aiohttp's error means to us."""
        match error:
            case aiohttp.InvalidURL() | UnicodeError():
                return ConfigError(f"{self._url} is no URL")
            case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
                return ServerUnreachable(f"{self._url} cannot be reached: {error}")
            case TimeoutError():
                return ServerTimeout(f"{self._url} gave no answer within {timeout_s:g} s")
            case aiohttp.ClientPayloadError():
                return BrokenResponse(f"{self._url} cut its answer short: {error}")
            case aiohttp.ClientConnectionError() | ConnectionError():
                return ServerUnavailable(f"{self._url} dropped the connection: {error}")
            case _:
                return BrokenResponse(f"{self._url} speaks no proper HTTP: {error}")


@asynccontextmanager
async def http_transport(
    url: str,
    headers: Mapping[str, str],
    *,
    tls: ssl.SSLContext | None = None,
    connect_timeout_s: float = 10.0,
    server_name: str | None = None,
) -> AsyncIterator[HttpTransport]:
    """A transport with a session of its own: as many connections as there are requests, none kept too long.

    Args:
        url: The server's base URL.
        headers: Sent with each request.
        tls: How https servers are checked; None is the system's way.
        connect_timeout_s: Bound on opening a connection.
        server_name: The server's name where `url` has its address: for its certificate and the Host header.
    """
    named = {} if server_name is None else {"Host": _authority(server_name, url)}
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S, ssl=tls or True),
        headers={"Content-Type": "application/json", **named, **headers},
        read_bufsize=2**20,
    ) as session:
        yield HttpTransport(url, session, connect_timeout_s, server_name)


def _authority(name: str, url: str) -> str:
    """`name` with the port that `url` has."""
    port = urlsplit(url).port
    return name if port is None else f"{name}:{port}"
