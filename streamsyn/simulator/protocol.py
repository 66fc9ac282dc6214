"""The bodies that the routes of SGLang 0.5.23 share.

Shapes: srt/entrypoints/http_server.py, srt/entrypoints/openai/serving_base.py.

What comes to the simulator and how its answer leaves, whatever carries them.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

import orjson

from streamsyn.simulator.ask import Answer, Ask, Malformed


@dataclass(slots=True)
class Statistics:
    """What `/simulator/stats` tells. `requests` are those to write or score; `by_route` counts all."""

    requests: int = 0
    answered: int = 0
    """Answers sent to the last byte, good or with bad content; tokens are counted for these."""
    aborted: int = 0
    """Requests that were answered with finish_reason "abort"."""
    disconnected: int = 0
    """Requests whose client went away first."""
    connections: int = 0
    """Connections on which at least one request came."""
    retracted: int = 0
    """How often a request was thrown out of the running batch to be computed again."""
    in_flight: int = 0
    max_in_flight: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    by_route: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    @property
    def cache_hit_rate(self) -> float:
        """Share of prompt tokens that came from the prefix cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """A plain copy, ready for JSON."""
        return {
            "requests": self.requests,
            "by_route": dict(self.by_route),
            "answered": self.answered,
            "faults": {str(kind): count for kind, count in self.faults.items()},
            "in_flight": self.in_flight,
            "max_in_flight": self.max_in_flight,
            "connections": self.connections,
            "aborted": self.aborted,
            "disconnected": self.disconnected,
            "retracted": self.retracted,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
        }


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


class Asked(NamedTuple):
    """A request as it arrives."""

    method: str
    path: str
    query: Mapping[str, str]
    authorization: str
    content_type: str
    body: bytes


class Line(Protocol):
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
        await self.finish(stream_error(message, kind, code))

    async def finish(self, event: bytes) -> None:
        """Ends the stream with its last event; one that is to be cut ends without it."""
        if self._cut:
            await self._line.cut()
            return
        await self._line.stream(event + DONE)
        await self._line.end()
