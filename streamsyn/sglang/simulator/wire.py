"""The bodies that the routes of SGLang 0.5.23 share.

Shapes: srt/entrypoints/http_server.py, srt/entrypoints/openai/serving_base.py.
"""

from typing import Any, Final

import orjson
from aiohttp import web

JSON_HEADERS: Final = {"Content-Type": "application/json"}

QUEUE_FULL: Final = "The request queue is full."


def reply(body: Any, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(body=orjson.dumps(body), status=status, headers=JSON_HEADERS)


def error(message: str, kind: str, code: int) -> dict[str, Any]:
    """The error object of the OpenAI routes, of refused HTTP and of bodies that are no JSON."""
    return {"object": "error", "message": message, "type": kind, "param": None, "code": code}


def malformed(message: str) -> web.Response:
    """400 for a body that does not fit its schema, on every route."""
    return reply(error(message, "Bad Request", 400), 400)


def queue_full() -> web.Response:
    """503, without Retry-After."""
    return reply(error(QUEUE_FULL, "503", 503), 503)


def internal_error() -> web.Response:
    """500."""
    return reply(error("Internal server error: simulated", "InternalServerError", 500), 500)


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: %s\n\n" % orjson.dumps(body)


def stream_error(message: str, kind: str, code: int) -> bytes:
    """An error inside a stream that began with 200 (`create_streaming_error_response`)."""
    return event({"error": error(message, kind, code)})
