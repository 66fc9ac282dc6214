"""One reader's connection: forms, compression, ends and cuts, heartbeats, slow clients."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
import pytest
import zstandard
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.daemon import stream_routes
from streamsyn.daemon.stream_routes import RowStream
from streamsyn.daemon.tail import Coding, Envelope, Position, RowForm
from tests.daemon.test_tail import Rows, tail_of
from tests.examples import examples

CODINGS: list[Coding] = ["identity", "gzip", "zstd"]


class Stream:
    """A server with one stream of rows, and what a test does to it."""

    def __init__(self, rows: Rows, url: str, session: aiohttp.ClientSession) -> None:
        self.rows = rows
        self.url = url
        self.session = session
        self.has_ended = False
        self.left = asyncio.Semaphore(0)
        """Released by each client that was served to its end."""
        self.wake: Callable[[], None] = lambda: None
        self.cut: Callable[[], None] = lambda: None

    def add(self, *sizes: int) -> None:
        self.rows.add(*sizes)
        self.wake()

    def end(self) -> None:
        self.has_ended = True
        self.wake()


@asynccontextmanager
async def served(form: RowForm, *, limit: int | None = None, follow: bool = True) -> AsyncIterator[Stream]:
    source = Rows()
    with tail_of(source) as (tail, streams):

        async def handler(request: web.Request) -> web.StreamResponse:
            tail.readers += 1
            try:
                sender = RowStream(request, tail, form, lambda: stream.has_ended)
                return await sender.send(Position(0), limit=limit, follow=follow)
            finally:
                tail.readers -= 1
                stream.left.release()

        app = web.Application()
        app.router.add_get("/", handler)
        async with TestServer(app) as server, aiohttp.ClientSession(auto_decompress=False) as session:
            stream = Stream(source, str(server.make_url("/")), session)
            stream.wake, stream.cut = tail.wake, streams.close
            yield stream


def decoder(coding: Coding) -> Any:
    match coding:
        case "gzip":
            return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress
        case "zstd":
            return zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress
        case _:
            return bytes


@pytest.mark.parametrize("coding", CODINGS)
async def test_live_rows_arrive_at_once(coding: Coding) -> None:
    async with served(RowForm("ndjson", coding)) as stream, stream.session.get(stream.url) as response:
        assert response.headers.get("Content-Encoding", "identity") == coding
        decode, got = decoder(coding), b""
        for number in range(3):
            stream.add(100)
            while got.count(b"\n") <= number:
                got += decode(await response.content.readany())
        stream.end()
        got += decode(await response.content.read())
        assert got == b"".join(stream.rows.lines_there)


@pytest.mark.parametrize("coding", CODINGS)
async def test_server_sent_events_have_the_seq_and_an_end(coding: Coding) -> None:
    async with served(RowForm("sse", coding)) as stream:
        stream.add(5, 5)
        stream.end()
        async with stream.session.get(stream.url) as response:
            assert response.content_type == "text/event-stream"
            lines = stream.rows.lines_there
            expected = b"".join(b"id: %d\ndata: %s\n" % (seq, line) for seq, line in enumerate(lines))
            got = decoder(coding)(await response.read())
            assert got == expected + b'event: end\ndata: {"rows":2}\n\n'


@pytest.mark.parametrize("framing", ["ndjson", "sse"])
async def test_a_stream_that_is_cut_off_has_no_proper_end(framing: Any) -> None:
    async with served(RowForm(framing)) as stream:
        stream.add(5)
        async with stream.session.get(stream.url) as response:
            got = await response.content.readany()
            stream.cut()
            with pytest.raises(aiohttp.ClientError):
                await response.content.read()
            assert b"event: end" not in got


async def test_without_follow_or_with_a_limit_the_rows_end_and_the_run_does_not() -> None:
    for limit, follow in ((2, True), (None, False)):
        async with served(RowForm("sse"), limit=limit, follow=follow) as stream:
            stream.add(*[5] * (limit or 3))
            async with stream.session.get(stream.url) as response:
                got = await response.read()
            assert (got.count(b"data:"), got.count(b"event: end")) == (limit or 3, 0)


async def test_a_silent_stream_sends_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_routes, "HEARTBEAT_S", 0.01)
    async with served(RowForm("sse")) as stream, stream.session.get(stream.url) as response:
        assert (await response.content.readexactly(6)) == b":\n\n:\n\n"
        stream.add(5)
        stream.end()
        assert b"id: 0\n" in await response.read()


async def test_a_client_that_has_gone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_routes, "HEARTBEAT_S", 0.01)
    async with served(RowForm()) as stream:
        response = await stream.session.get(stream.url)
        response.close()
        await stream.left.acquire()


async def test_a_client_that_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs a part of one piece of memory, and other readers are not held up by it."""
    monkeypatch.setattr(stream_routes, "WRITE_TIMEOUT_S", 0.2)
    buffered: list[int] = []
    cut = RowStream._cut

    def noting(stream: RowStream, why: str) -> None:
        transport = stream._request.transport
        buffered.append(0 if transport is None else transport.get_write_buffer_size())
        cut(stream, why)

    monkeypatch.setattr(RowStream, "_cut", noting)
    async with served(RowForm()) as stream:
        stream.add(*[2**20] * 30)
        stream.end()
        async with stream.session.get(stream.url) as slow:
            async with stream.session.get(stream.url) as fast:
                assert await fast.read() == b"".join(stream.rows.lines_there)
            await stream.left.acquire()  # the fast one
            await stream.left.acquire()
            with pytest.raises(aiohttp.ClientError):
                await slow.read()
    assert len(buffered) == 1
    assert 0 < buffered[0] < 400_000  # of rows of a megabyte


@given(
    pieces=st.lists(st.lists(st.binary(max_size=200).map(bytes.hex), max_size=5), max_size=5),
    framing=st.sampled_from(["ndjson", "sse"]),
    coding=st.sampled_from(CODINGS),
)
@examples(60)
def test_pieces_of_any_form_join_to_one_body(pieces: list[list[str]], framing: Any, coding: Coding) -> None:
    form, envelope = RowForm(framing, coding), Envelope(coding)
    body, plain, seq = envelope.begin(), b"", 0
    for texts in pieces:
        lines = [orjson.dumps({"x": text}) + b"\n" for text in texts]
        piece = form.rows(seq, lines)
        envelope.add(piece)
        body, plain, seq = body + piece.body, plain + piece.plain, seq + len(lines)
    body += envelope.end()
    if coding == "gzip":
        member = zlib.decompressobj(16 + zlib.MAX_WBITS)
        assert member.decompress(body) == plain
        assert member.eof  # its checksum and size are right
        assert not member.unused_data
    else:
        assert decoder(coding)(body) == plain
