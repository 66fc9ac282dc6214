"""How a request reaches a server: over HTTP and TLS. The simulator has a transport within the process.

`http_connections` sends with aiohttp; its errors are translated here into those of `streamsyn.errors`.
"""

import asyncio
import errno
import math
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from streamsyn.config.sections import FleetSection
from streamsyn.errors import (
    BrokenResponse,
    ConfigError,
    ServerBusy,
    ServerTimeout,
    ServerUnavailable,
    ServerUnreachable,
    StreamsynError,
    WrongAddress,
)
from streamsyn.fleet.http_connections import Answer, HttpConnections
from streamsyn.plain_text import cut

VERSIONED = re.compile(r"(?<!/)/v\d+[a-z0-9]*(?:/openai)?$")
"""The end of a base URL to which no `/v1` is added."""
KEY_VARIABLE = "STREAMSYN_API_KEY"
"""Default environment variable of the servers' key."""
KEEP_ALIVE_S = 4.0
"""Shorter than the default 5 s after which an SGLang server closes an idle connection."""
_STALE_WITHIN_S = 1.0
"""A stale connection fails within this time; one that fails later carried a request."""
_FOREIGN = (aiohttp.ClientError, HttpProcessingError, ConnectionError, TimeoutError, UnicodeError)
"""What aiohttp raises; UnicodeError if a host name is invalid."""
_OK = 200
_NO_FILES = (errno.EMFILE, errno.ENFILE)
"""Our own limits: the server has not failed, and the request can wait."""
_REDIRECTS = range(300, 400)
_REFUSAL_BYTES = 2**16
"""What is read of an answer with another status than 200: its message is at the beginning."""
_NO_HEADERS: Mapping[str, str] = {}
MAX_RETRY_AFTER_S = 600.0
"""Longest pause in seconds: a server that asks for more is asked again after this time."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The HTTP status and the body of an answer.

    Attributes:
        status: HTTP status.
        body: The whole body, or the beginning of a long refusal.
        retry_after_s: The pause in seconds that an answer without status 200 asks for.
    """

    status: int
    body: bytes
    retry_after_s: float | None = None


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
        """Send a request and return the whole answer. Redirects are not followed.

        Args:
            method: HTTP method.
            path: Path below the server's base URL.
            body: JSON.
            headers: Sent beside those of the transport.
            timeout_s: Timeout of the whole exchange in seconds.
            on_data: Called when the first byte of an answer with status 200 has come.

        Raises:
            ServerError: No answer came; the subclass says what to do next.
        """
        ...


class HttpTransport:
    """A transport over kept-alive HTTP connections. Made by `http_transport`.

    Args:
        url: The server's base URL.
        connections: To this server.
        query: Query of each request, such as `api-version=2024-02-01`.
        max_answer_bytes: Longest answer, decompressed; of a longer one no more is read.
    """

    def __init__(
        self, url: str, connections: HttpConnections, query: str = "", max_answer_bytes: int = 2**25
    ) -> None:
        self._url = url
        self._connections = connections
        self._query = query
        self._max_answer_bytes = max_answer_bytes

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

        A connection that is lost at once and without a byte is most likely a kept-alive one that the server
        was closing. The request is then sent once more, on a new connection.
        """
        if self._connections.is_closed:
            raise ServerUnavailable(f"{self._url} was removed")
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    return await self._once(method, path, body, headers, on_data)
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                    late = clock() - started > _STALE_WITHIN_S
                    if late or isinstance(error, aiohttp.ClientConnectorError):
                        raise
                return await self._once(method, path, body, headers, on_data)
        except _FOREIGN as error:
            raise self._translate(error, timeout_s) from error

    async def _once(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        on_data: Callable[[], None] | None,
    ) -> Reply:
        target = route(self._url, path)
        if self._query:
            target += ("&" if "?" in path else "?") + self._query
        answer = await self._connections.send(method, target, body, headers)
        try:
            if answer.status in _REDIRECTS:
                raise _redirected(self._url, path, answer.status, answer.headers.get("Location", ""))
            body_read = await self._read(answer, on_data)
            if answer.status != _OK:
                return Reply(answer.status, body_read, retry_after_s(answer.headers, time.time()))
            return Reply(answer.status, body_read)
        finally:
            answer.end()

    async def _read(self, answer: Answer, on_data: Callable[[], None] | None) -> bytes:
        """Return the body of an answer, or the beginning of a long refusal.

        aiohttp decompresses in steps of about its read buffer, and only as far as it is read.
        """
        is_ok = answer.status == _OK
        limit = self._max_answer_bytes if is_ok else _REFUSAL_BYTES
        content = answer.content
        chunks: list[bytes] = []
        size = 0
        if is_ok and int(answer.headers.get("Content-Length", 0)) > limit:  # of the compressed body
            size = limit + 1
        while size <= limit and (chunk := await content.readany()):
            if on_data is not None and is_ok and not _is_comment(chunk):  # nor is a refusal a first token
                on_data()
                on_data = None
            chunks.append(chunk)
            size += len(chunk)
        if size > limit and is_ok:
            chunks.clear()  # the error's traceback would keep them
            raise BrokenResponse(
                f"{self._url} sent an answer of more than fleet.max_answer_bytes = {limit} bytes"
            )
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _translate(self, error: Exception, timeout_s: float) -> StreamsynError:
        match error:
            case aiohttp.InvalidURL() | UnicodeError():
                return ConfigError(f"{self._url} is not a valid URL")
            case aiohttp.ClientConnectorError() if error.os_error.errno in _NO_FILES:
                return ServerBusy(f"too many open files for a connection to {self._url}: raise `ulimit -n`")
            case aiohttp.ClientConnectorError() if _is_not_tls(error.os_error):
                return ServerUnreachable(f"{self._url} does not speak TLS; use http:// in place of https://")
            case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
                return ServerUnreachable(f"cannot connect to {self._url}: {error}")
            case TimeoutError():
                return ServerTimeout(f"{self._url} did not answer within {timeout_s:g} s")
            case aiohttp.ClientPayloadError():
                return ServerUnavailable(f"{self._url} ended its answer early: {error}")
            case aiohttp.ClientConnectionError() | ConnectionError():
                return ServerUnavailable(f"{self._url} closed the connection: {error}")
            case HttpProcessingError():  # its own text has the status that a server would answer
                return BrokenResponse(f"invalid HTTP response from {self._url}: {error.message}")
            case _:
                return BrokenResponse(f"invalid HTTP response from {self._url}: {error}")


def _is_comment(chunk: bytes) -> bool:
    """Whether there are only comments in a piece of a stream: servers send them while a request waits."""
    return chunk.startswith(b":") and b"data" not in chunk


def route(base: str, path: str) -> str:
    """The path to add to a base URL: one that ends in a version, such as `/api/paas/v4`, gets no `/v1`.

    So it is with OpenAI's clients, whose base URLs all end in a version.
    """
    return path.removeprefix("/v1") if VERSIONED.search(base) else path


def _redirected(base: str, path: str, status: int, location: str) -> WrongAddress:
    """Return the error for a redirect, which names the URL to use instead."""
    try:
        target = urljoin(base + path, location)
    except ValueError:  # a malformed one
        target = location
    return WrongAddress(
        f"{base} answered {status}: it redirects {path} to {cut(target, 500) or 'nowhere'}. Redirects are "
        "not followed; give the URL of the server that it redirects to"
    )


@asynccontextmanager
async def http_transport(
    url: str,
    headers: Mapping[str, str],
    *,
    tls: ssl.SSLContext | None = None,
    connect_timeout_s: float = 10.0,
    server_name: str | None = None,
    query: str = "",
    max_answer_bytes: int = 2**25,
) -> AsyncIterator[HttpTransport]:
    """Open a transport with connections of its own, and no limit on them.

    Args:
        url: The server's base URL.
        headers: Sent with each request.
        tls: From `tls_context`; None uses the system's certificates.
        connect_timeout_s: Timeout of opening a connection.
        server_name: The server's name if `url` has its address: for its certificate and the Host header.
        query: Query of each request.
        max_answer_bytes: Longest answer, decompressed.
    """
    named = {} if server_name is None else {"Host": _authority(server_name, url)}
    async with aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S, ssl=tls or True) as connector:
        sent = {"Content-Type": "application/json", **named, **headers}
        connections = HttpConnections(connector, url, sent, connect_timeout_s, server_name)
        yield HttpTransport(url, connections, query, max_answer_bytes)


def _authority(name: str, url: str) -> str:
    """Return `name` with the port of `url`."""
    port = urlsplit(url).port
    return name if port is None else f"{name}:{port}"


def _is_not_tls(error: OSError) -> bool:
    """Whether a handshake failed since the server answered with something else than TLS."""
    return isinstance(error, ssl.SSLError) and error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST")


def tls_context(section: FleetSection) -> ssl.SSLContext | None:
    """Return the TLS settings of `fleet.tls_ca` and `fleet.tls_cert`; None when neither is set.

    Reads files: call it before the event loop runs, or in a thread.

    Raises:
        ConfigError: A file cannot be read, or has no valid certificate or key.
    """
    if section.tls_ca is None and section.tls_cert is None:
        return None
    context = _context_trusting(section.tls_ca)
    context.set_alpn_protocols(["http/1.1"])  # as in aiohttp's own contexts
    if section.tls_cert is not None:
        _load_certificate(context, section.tls_cert)
    return context


def _context_trusting(authorities: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=authorities)
    except ssl.SSLError as error:
        raise ConfigError(f"fleet.tls_ca: {authorities} has no PEM certificates ({error.reason})") from error
    except OSError as error:
        raise ConfigError(f"fleet.tls_ca: cannot read {authorities}: {error.strerror}") from error


def _load_certificate(context: ssl.SSLContext, certificate: Path) -> None:
    try:
        # Without a password OpenSSL would ask for one at the terminal.
        context.load_cert_chain(certificate, password="")
    except ssl.SSLError as error:
        reason = f" ({error.reason})" if error.reason else ""
        raise ConfigError(
            f"fleet.tls_cert: {certificate} must hold a PEM certificate and its key, without a pass phrase"
            f"{reason}"
        ) from error
    except OSError as error:
        raise ConfigError(f"fleet.tls_cert: cannot read {certificate}: {error.strerror}") from error


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Return the pause in seconds that the headers of an answer ask for; None without a valid one.

    Args:
        headers: Those of the answer. A date is compared with its `Date`, so that clocks need not agree.
        now: Unix time in seconds, used if `Date` is missing or invalid.
    """
    value = headers.get("Retry-After", "").strip()
    if not value:
        return None
    try:
        seconds = float(value)  # the standard has whole seconds; some servers send fractions
    except ValueError:
        at, sent = _unix_time(value), _unix_time(headers.get("Date", ""))
        if at is None:
            return None
        seconds = max(0.0, at - (now if sent is None else sent))
    return min(seconds, MAX_RETRY_AFTER_S) if seconds >= 0 and math.isfinite(seconds) else None


def _unix_time(date: str) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
