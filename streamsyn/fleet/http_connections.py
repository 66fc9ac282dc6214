"""HTTP/1.1 requests over the connections of an aiohttp connector, without the session on top of it.

The connector opens, encrypts and keeps connections, and aiohttp parses and decompresses answers. What a
session adds to each request (cookies, redirects, proxies, objects for request and response) is not used here,
and takes three quarters of its CPU time.
"""

import asyncio
import re
from collections.abc import Mapping

import aiohttp
from aiohttp.client_proto import ResponseHandler
from multidict import CIMultiDictProxy
from yarl import URL

_READ_BYTES = 2**20
"""What is read ahead of an answer."""
_HEADER_BYTES = 2**16
"""Longest status line and longest header of an answer."""
_CONTROL = re.compile(r"[\0\r\n]")


class Answer:
    """The beginning of an answer: its status, its headers and the stream of its body. Call `end` once.

    Attributes:
        status: HTTP status.
        headers: Headers.
        content: The body, decompressed.
    """

    __slots__ = ("_connection", "content", "headers", "status")

    def __init__(
        self,
        connection: aiohttp.connector.Connection,
        status: int,
        headers: CIMultiDictProxy[str],
        content: aiohttp.StreamReader,
    ) -> None:
        self._connection = connection
        self.status = status
        self.headers = headers
        self.content = content

    def end(self) -> None:
        """Give the connection back, or close it if it cannot carry another request."""
        transport = self._connection.transport
        if transport is not None and transport.get_write_buffer_size():  # answered before all of it was sent
            transport.abort()  # closing would wait until the server has taken the rest
        self._connection.release()  # which closes it if it is lost, or the answer was not read to its end


class HttpConnections:
    """Sends requests to one server. `close` the connector afterwards.

    Args:
        connector: Opens and keeps the connections.
        url: The server's base URL.
        headers: Sent with each request.
        connect_timeout_s: Timeout of opening a connection.
        server_name: Name that its certificate is checked against, if not the URL's.
    """

    def __init__(
        self,
        connector: aiohttp.BaseConnector,
        url: str,
        headers: Mapping[str, str],
        connect_timeout_s: float,
        server_name: str | None = None,
    ) -> None:
        self._connector = connector
        self._url = url
        self._headers = headers
        self._timeout = aiohttp.ClientTimeout(sock_connect=connect_timeout_s)
        self._server_name = server_name
        self._targets: dict[tuple[str, str], tuple[aiohttp.ClientRequest, bytes]] = {}
        """For each method and path, what the connector asks for, and the first lines of the request."""

    @property
    def is_closed(self) -> bool:
        """Whether the connector is closed."""
        return self._connector.closed

    async def send(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        """Send a request and wait for the beginning of its answer.

        Args:
            method: HTTP method.
            path: Path below the base URL, with its query.
            body: The body; None for none.
            headers: Sent beside those of each request.

        Raises:
            aiohttp.ClientError: No answer came.
            aiohttp.http_exceptions.HttpProcessingError: What came is not an answer.
            ValueError: A header has a line break in it.
        """
        target, head = self._targets.get((method, path)) or self._target(method, path)
        if headers:
            head += _lines(headers)
        if body is not None:
            head += b"Content-Length: %d\r\n" % len(body)
        try:
            connection = await self._connector.connect(target, [], self._timeout)
        except TimeoutError as error:
            raise aiohttp.ConnectionTimeoutError(f"connection timeout to host {self._url}") from error
        try:
            protocol, transport = connection.protocol, connection.transport
            assert protocol is not None, "the connection is new"
            protocol.set_response_params(
                read_until_eof=True,
                read_bufsize=_READ_BYTES,
                max_line_size=_HEADER_BYTES,
                max_field_size=_HEADER_BYTES,
            )
            if transport is not None:  # else it is lost, which reading raises
                transport.write(b"%b\r\n%b" % (head, body or b""))
            return await _begun(connection, protocol)
        except BaseException:
            connection.close()
            raise

    def _target(self, method: str, path: str) -> tuple[aiohttp.ClientRequest, bytes]:
        """Have aiohttp check the URL and choose the headers of all requests with this method and path."""
        try:
            url = URL(self._url + path)
        except ValueError as error:
            raise aiohttp.InvalidURL(self._url + path) from error
        target = aiohttp.ClientRequest(
            method,
            url,
            headers=self._headers,
            server_hostname=self._server_name,
            loop=asyncio.get_running_loop(),
        )
        target.headers.popall("Content-Length", None)  # which each request has for itself
        head = f"{method} {target.url.raw_path_qs} HTTP/1.1\r\n".encode() + _lines(target.headers)
        self._targets[method, path] = target, head
        return target, head


async def _begun(connection: aiohttp.connector.Connection, protocol: ResponseHandler) -> Answer:
    """Wait for an answer, behind any interim ones (1xx)."""
    while True:
        message, content = await protocol.read()
        if message.code >= 200 or message.code == 101:
            return Answer(connection, message.code, message.headers, content)


def _lines(headers: Mapping[str, str]) -> bytes:
    for name, value in headers.items():
        if _CONTROL.search(name) or _CONTROL.search(value):
            raise ValueError(f"the header {name!r} has a line break or a null character in it")
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()]).encode()
