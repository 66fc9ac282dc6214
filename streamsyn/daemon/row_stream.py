"""One reader's connection: rows as NDJSON or server-sent events, until they end or the client is gone.

The response of a stream that was cut off (the daemon shuts down, the run is deleted, the client is too slow)
has no proper end: the last chunk is missing, and server-sent events lack `event: end`. So a client knows that
it has to connect again, and asks for what comes after the last `seq` it has seen.
"""

import asyncio
from collections.abc import Callable

import structlog
from aiohttp import web

from streamsyn.daemon.tail import Encoded, Envelope, Position, RowForm, Tail
from streamsyn.errors import SinkError

log = structlog.get_logger()

HEARTBEAT_S = 15.0
"""Seconds of silence after which an event stream gets a comment, and a client that has gone is noticed."""
WRITE_TIMEOUT_S = 300.0
"""A client that takes nothing for this long is cut off."""
_SLICE_BYTES = 256 * 2**10
"""Longer pieces (of long rows) are sent in slices: what a connection buffers does not depend on its rows."""
_CONTENT_TYPES = {"ndjson": "application/x-ndjson", "sse": "text/event-stream"}


class CutOff(Exception):
    """Raised when a stream ends before its rows do."""


class RowStream:
    """Sends the rows of a tail to one client.

    Args:
        request: The client's request.
        tail: The rows.
        form: How they are sent.
        has_ended: Whether the run has ended: there will be no more rows than there are.
    """

    def __init__(
        self, request: web.Request, tail: Tail, form: RowForm, has_ended: Callable[[], bool]
    ) -> None:
        self._request = request
        self._tail = tail
        self._form = form
        self._has_ended = has_ended
        self._loop = asyncio.get_running_loop()
        self._envelope = Envelope(form.coding)
        headers = {"Content-Type": _CONTENT_TYPES[form.framing], "Cache-Control": "no-store"}
        if form.coding != "identity":
            headers["Content-Encoding"] = form.coding
        self._response = web.StreamResponse(headers={**headers, "Vary": "Accept, Accept-Encoding"})

    async def send(self, at: Position, *, limit: int | None, follow: bool) -> web.StreamResponse:
        """Send rows from a position on; returns the response.

        Args:
            at: Where to begin.
            limit: Maximum number of rows.
            follow: Wait for more rows until the run has ended; otherwise end with the rows there are.

        Raises:
            SinkError: Rows cannot be read. After the first piece, this cuts the stream off.
        """
        await self._tail.piece(at, self._form, limit)  # an error can still be answered
        await self._response.prepare(self._request)
        if self._request.method == "HEAD":
            return self._response
        try:
            await self._write(self._envelope.begin())
            end = await self._send_rows(at, limit, follow=follow)
            if end is not None and self._form.framing == "sse":
                await self._send(self._form.text(b'event: end\ndata: {"rows":%d}\n\n' % end.seq))
            await self._write(self._envelope.end())
        except (CutOff, SinkError) as why:
            self._cut(str(why))
        except ConnectionError:  # the client has gone; it asks again if it wants more
            log.debug("stream.left", path=self._request.path)
        return self._response

    async def _send_rows(self, at: Position, limit: int | None, *, follow: bool) -> Position | None:
        """Send rows; returns the position after the last row of a run that has ended, else None."""
        tail = self._tail
        while limit is None or limit > 0:
            news, has_ended = tail.news, self._has_ended()  # before the rows: none is written after the end
            piece = await tail.piece(at, self._form, limit)
            if tail.is_closed:
                raise CutOff("the daemon is shutting down, or the run was deleted")
            if piece is not None:
                await self._send(piece.encoded)
                at = piece.next
                limit = None if limit is None else limit - piece.rows
            elif has_ended:
                return at
            elif follow:
                await self._wait(news)
            else:
                return None
        return None

    async def _wait(self, news: asyncio.Event) -> None:
        """Wait for news; in a long silence, send comments and look whether the client is still there."""
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await news.wait()
                    return
            except TimeoutError:
                transport = self._request.transport
                if transport is None or transport.is_closing():
                    raise ConnectionResetError from None
                if self._form.framing == "sse":
                    await self._send(self._form.text(b":\n\n"))

    async def _send(self, piece: Encoded) -> None:
        self._envelope.add(piece)
        await self._write(piece.body)

    async def _write(self, data: bytes) -> None:
        for start in range(0, len(data), _SLICE_BYTES):
            whole = len(data) <= _SLICE_BYTES
            timer = self._loop.call_later(WRITE_TIMEOUT_S, self._cut, "it took nothing for too long")
            try:
                await self._response.write(data if whole else data[start : start + _SLICE_BYTES])
            finally:
                timer.cancel()

    def _cut(self, why: str) -> None:
        """Drop the connection; a write in progress raises a ConnectionError."""
        log.info("stream.cut_off", path=self._request.path, why=why)
        if (transport := self._request.transport) is not None:
            transport.abort()
