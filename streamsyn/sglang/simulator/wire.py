"""The bodies that the routes of SGLang 0.5.23 share.

Shapes: srt/entrypoints/http_server.py, srt/entrypoints/openai/serving_base.py.
"""

from typing import Any, Final, NamedTuple

import orjson

from streamsyn.sglang.simulator.asks import Malformed

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
