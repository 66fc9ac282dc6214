"""The bodies that the routes of SGLang 0.5.23 share.

Shapes: srt/entrypoints/http_server.py, srt/entrypoints/openai/serving_base.py.

What comes to the simulator and how its answer leaves, whatever carries them.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Protocol

import orjson

from streamsyn.simulator.completion_request import Answer, CompletionRequest, Malformed

JSON: Final = "application/json"

QUEUE_FULL: Final = "The request queue is full."


class Reply(NamedTuple):
    """A whole answer, however it travels."""

    status: int = 200
    body: bytes = b""
    content_type: str | None = None


def reply(body: Any, status: int = 200) -> Reply:
    """A JSON answer."""
    return Reply(status, orjson.dumps(body), JSON)


def error(message: str, kind: str, code: int) -> dict[str, Any]:
    """The error object of the OpenAI routes, of refused HTTP and of bodies that are no JSON."""
    return {"object": "error", "message": message, "type": kind, "param": None, "code": code}


def malformed(message: str) -> Reply:
    """400 for a body that does not fit its schema, on every route."""
    return reply(error(message, "Bad Request", 400), 400)


def queue_full() -> Reply:
    """503, without Retry-After."""
    return reply(error(QUEUE_FULL, "503", 503), 503)


def internal_error() -> Reply:
    """500."""
    return reply(error("Internal server error: simulated", "InternalServerError", 500), 500)


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: %s\n\n" % orjson.dumps(body)


def stream_error(message: str, kind: str, code: int) -> bytes:
    """An error inside a stream that began with 200 (`create_streaming_error_response`)."""
    return event({"error": error(message, kind, code)})


def read_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        Malformed: It is none.
    """
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as problem:
        raise Malformed(f"body: JSON decode error: {problem}") from None
    if not isinstance(body, dict):
        raise Malformed("body: Input should be a valid dictionary")
    return body


class RawRequest(NamedTuple):
    """A request as it arrives."""

    method: str
    path: str
    query: Mapping[str, str]
    authorization: str
    content_type: str
    body: bytes


class ResponseWriter(Protocol):
    """The way back to the client: a connection, or a call within the process.

    Sending raises ConnectionError, or the task is cancelled, when the client has gone.
    """

    async def send(self, reply: Reply) -> None:
        """The whole answer."""
        ...

    async def stream(self, data: bytes) -> None:
        """The next part of a streamed answer; the first part brings the status, 200."""
        ...

    async def end(self) -> None:
        """The streamed answer is complete."""
        ...

    async def cut(self, reply: Reply | None = None) -> None:
        """Closes before the answer is complete: half-way through `reply`, or in the stream where it is."""
        ...

    def reset(self) -> None:
        """Resets the connection, wherever the answer is."""
        ...


DONE: Final = b"data: [DONE]\n\n"


class StreamFormat(Protocol):
    """How a dialect words the parts of a streamed answer."""

    def piece(self, request: CompletionRequest, so_far: str, piece: str) -> bytes: ...
    def last(self, request: CompletionRequest, answer: Answer) -> bytes: ...


class EventStream:
    """A streamed answer. Nothing is sent, not even the status, before its first event."""

    def __init__(
        self, writer: ResponseWriter, stream_format: StreamFormat, request: CompletionRequest, *, cut: bool
    ) -> None:
        self._writer = writer
        self._stream_format = stream_format
        self._request = request
        self._cut = cut
        self._so_far = ""

    async def feed(self, piece: str) -> None:
        """Sends the next piece of the text."""
        event = self._stream_format.piece(self._request, self._so_far, piece)
        self._so_far += piece
        if event:
            await self._writer.stream(event)

    async def fail(self, message: str, kind: str, code: int) -> None:
        """Ends the stream with an error in it."""
        await self.finish(stream_error(message, kind, code))

    async def finish(self, event: bytes) -> None:
        """Ends the stream with its last event; one that is to be cut ends without it."""
        if self._cut:
            await self._writer.cut()
            return
        await self._writer.stream(event + DONE)
        await self._writer.end()
