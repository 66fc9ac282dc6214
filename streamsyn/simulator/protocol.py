"""What the routes of SGLang 0.5.23 share: requests, replies, error objects and event streams.

Shapes: srt/entrypoints/http_server.py, srt/entrypoints/openai/serving_base.py.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Protocol

import orjson

from streamsyn.simulator.completion_request import Answer, CompletionRequest, Malformed

JSON: Final = "application/json"

QUEUE_FULL: Final = "The request queue is full."
QUOTA: Final = "You exceeded your current quota."


class Reply(NamedTuple):
    """A whole answer: status, body, content type and `Retry-After` in seconds."""

    status: int = 200
    body: bytes = b""
    content_type: str | None = None
    retry_after_s: int | None = None


def reply(body: Any, status: int = 200) -> Reply:
    """Return a JSON answer."""
    return Reply(status, orjson.dumps(body), JSON)


def error(message: str, kind: str, code: int) -> dict[str, Any]:
    """Return the error object of the OpenAI routes, of invalid HTTP and of invalid JSON."""
    return {"object": "error", "message": message, "type": kind, "param": None, "code": code}


def malformed(message: str) -> Reply:
    """Return 400 for a body that does not match its schema; the same on every route."""
    return reply(error(message, "Bad Request", 400), 400)


def queue_full() -> Reply:
    """Return 503 without Retry-After."""
    return reply(error(QUEUE_FULL, "503", 503), 503)


def rate_limited(retry_after_s: int | None = None) -> Reply:
    """Return 429 as hosted APIs do, with `Retry-After` if `retry_after_s` is given."""
    details = {"message": QUOTA, "type": "insufficient_quota", "param": None, "code": "insufficient_quota"}
    return Reply(429, orjson.dumps({"error": details}), JSON, retry_after_s)


def internal_error() -> Reply:
    """Return 500."""
    return reply(error("Internal server error: simulated", "InternalServerError", 500), 500)


def event(body: Any) -> bytes:
    """Return a server-sent event."""
    return b"data: %s\n\n" % orjson.dumps(body)


def stream_error(message: str, kind: str, code: int) -> bytes:
    """Return an error event for a stream that began with 200 (`create_streaming_error_response`)."""
    return event({"error": error(message, kind, code)})


def read_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`.

    Raises:
        Malformed: It is not a JSON object.
    """
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as problem:
        raise Malformed(f"body: JSON decode error: {problem}") from None
    if not isinstance(body, dict):
        raise Malformed("body: Input should be a valid dictionary")
    return body


class RawRequest(NamedTuple):
    """A request as it arrives, before its body is parsed."""

    method: str
    path: str
    query: Mapping[str, str]
    authorization: str
    content_type: str
    body: bytes


class ResponseWriter(Protocol):
    """Writes the answer to the client: to a connection, or to a caller in the same process.

    If the client has disconnected, sending raises ConnectionError, or the task is cancelled.
    """

    async def send(self, reply: Reply) -> None:
        """Send a whole answer."""
        ...

    async def stream(self, data: bytes) -> None:
        """Send the next part of a streamed answer; the first part also sends status 200."""
        ...

    async def end(self) -> None:
        """Complete a streamed answer."""
        ...

    async def cut(self, reply: Reply | None = None) -> None:
        """Close the connection early: half-way through `reply`, or in the middle of the stream."""
        ...

    def reset(self) -> None:
        """Reset the connection."""
        ...


DONE: Final = b"data: [DONE]\n\n"


class StreamFormat(Protocol):
    """Formats the parts of a streamed answer."""

    def piece(self, request: CompletionRequest, so_far: str, piece: str) -> bytes: ...
    def last(self, request: CompletionRequest, answer: Answer) -> bytes: ...


class EventStream:
    """A streamed answer. Nothing is sent, not even the status, before the first event."""

    def __init__(
        self, writer: ResponseWriter, stream_format: StreamFormat, request: CompletionRequest, *, cut: bool
    ) -> None:
        self._writer = writer
        self._stream_format = stream_format
        self._request = request
        self._cut = cut
        self._so_far = ""

    async def feed(self, piece: str) -> None:
        """Send the next piece of the text."""
        event = self._stream_format.piece(self._request, self._so_far, piece)
        self._so_far += piece
        if event:
            await self._writer.stream(event)

    async def fail(self, message: str, kind: str, code: int) -> None:
        """End the stream with an error event."""
        await self.finish(stream_error(message, kind, code))

    async def finish(self, event: bytes) -> None:
        """End the stream with its last event; without it if the stream is to be cut."""
        if self._cut:
            await self._writer.cut()
            return
        await self._writer.stream(event + DONE)
        await self._writer.end()
