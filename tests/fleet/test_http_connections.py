"""Requests over the connections of an aiohttp connector, against a server that speaks bytes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from streamsyn.fleet.transport import HttpTransport, http_transport

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@asynccontextmanager
async def served(serve: Serve) -> AsyncIterator[HttpTransport]:
    """A transport to a server that handles each connection with `serve`."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve(reader, writer)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, http_transport(url, {"X-Own": "1"}) as transport:
        yield transport


async def test_requests_share_a_connection_and_name_the_host() -> None:
    """The head of a request has its length, the headers of all requests and its own."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            assert await reader.readexactly(4) == b"body"
            writer.write(OK)

    async with served(serve) as transport:
        for number in range(2):
            reply = await transport.exchange(
                "POST", "/p?q=1", body=b"body", headers={"X-Number": str(number)}, timeout_s=5.0
            )
            assert (reply.status, reply.body) == (200, b"ok")
    for number, head in enumerate(heads):
        first, *lines = head.decode().split("\r\n")
        assert first == "POST /p?q=1 HTTP/1.1"
        headers = dict(line.split(": ") for line in lines if line)
        assert headers["X-Own"] == "1"
        assert headers["X-Number"] == str(number)
        assert headers["Content-Length"] == "4"
        assert headers["Host"].startswith("127.0.0.1:")
        assert headers["Content-Type"] == "application/json"


async def test_interim_answers_are_skipped() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK)

    async with served(serve) as transport:
        assert (await transport.exchange("GET", "/", timeout_s=5.0)).body == b"ok"


async def test_a_connection_with_an_unsent_request_is_not_used_again() -> None:
    """A server may answer before it has read the whole request; the rest of it must not follow."""
    lost = asyncio.Semaphore(0)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        with suppress(ConnectionError):  # the client has closed the connection
            await reader.read(-1)
        lost.release()

    async with served(serve) as transport:
        for _ in range(2):
            reply = await transport.exchange("POST", "/", body=bytes(2**25), timeout_s=5.0)
            assert reply.body == b"ok"
            await lost.acquire()


async def test_a_header_with_a_line_break_is_refused() -> None:
    """It would end the header and begin another one."""
    async with http_transport("http://one:1", {}) as transport:
        with pytest.raises(ValueError, match="'X-Key' has a line break"):
            await transport.exchange("GET", "/", headers={"X-Key": "a\r\nX-Other: b"}, timeout_s=5.0)
