from typing import Final, Protocol

from streamsyn.sglang.simulator import wire
from streamsyn.sglang.simulator.answers import Answer
from streamsyn.sglang.simulator.asks import Ask
from streamsyn.sglang.simulator.line import Line

DONE: Final = b"data: [DONE]\n\n"


class Wording(Protocol):
    """How a dialect words the parts of a streamed answer."""

    def piece(self, ask: Ask, so_far: str, piece: str) -> bytes: ...
    def last(self, ask: Ask, answer: Answer) -> bytes: ...


class EventStream:
    """A streamed answer. Nothing is sent, not even the status, before its first event."""

    def __init__(self, line: Line, wording: Wording, ask: Ask, *, cut: bool) -> None:
        self._line = line
        self._wording = wording
        self._ask = ask
        self._cut = cut
        self._so_far = ""

    async def feed(self, piece: str) -> None:
        """Sends the next piece of the text."""
        event = self._wording.piece(self._ask, self._so_far, piece)
        self._so_far += piece
        if event:
            await self._line.stream(event)

    async def fail(self, message: str, kind: str, code: int) -> None:
        """Ends the stream with an error in it."""
        await self.finish(wire.stream_error(message, kind, code))

    async def finish(self, event: bytes) -> None:
        """Ends the stream with its last event; one that is to be cut ends without it."""
        if self._cut:
            await self._line.cut()
            return
        await self._line.stream(event + DONE)
        await self._line.end()
