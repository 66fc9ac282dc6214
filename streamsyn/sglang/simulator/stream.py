from typing import TYPE_CHECKING, Final

from aiohttp import web

from streamsyn.sglang.simulator import wire
from streamsyn.sglang.simulator.asks import Ask

if TYPE_CHECKING:
    from streamsyn.sglang.simulator.generation import Dialect

HEADERS: Final = {"Content-Type": "text/event-stream; charset=utf-8"}
DONE: Final = b"data: [DONE]\n\n"


class EventStream:
    """A streamed answer. Nothing is sent, not even the status, before its first event."""

    def __init__(self, request: web.Request, dialect: "Dialect", ask: Ask, *, cut: bool) -> None:
        self._request = request
        self._dialect = dialect
        self._ask = ask
        self._cut = cut
        self._response = web.StreamResponse(headers=HEADERS)
        self._so_far = ""

    async def feed(self, piece: str) -> None:
        """Sends the next piece of the text."""
        event = self._dialect.piece(self._ask, self._so_far, piece)
        self._so_far += piece
        if event:
            await self._send(event)

    async def fail(self, message: str, kind: str, code: int) -> web.StreamResponse:
        """Ends the stream with an error in it."""
        return await self.finish(wire.stream_error(message, kind, code))

    async def finish(self, event: bytes) -> web.StreamResponse:
        """Ends the stream with its last event; one that is to be cut ends without it."""
        if self._cut:
            await self._send(b"")
            if self._request.transport is not None:
                self._request.transport.close()
            return self._response
        await self._send(event + DONE)
        await self._response.write_eof()
        return self._response

    async def _send(self, data: bytes) -> None:
        if not self._response.prepared:
            await self._response.prepare(self._request)
        await self._response.write(data)
