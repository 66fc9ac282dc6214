"""Errors as HTTP answers: `application/problem+json` of RFC 9457, and OpenAI's form below its paths."""

from http import HTTPStatus
from typing import Any, Final

import orjson
from aiohttp import web

from streamsyn.daemon.run_record import Refused
from streamsyn.errors import (
    ConfigError,
    DirectoryInUse,
    InboxClosed,
    KeyInUse,
    RowsRemoved,
    SinkError,
    StoppedEarly,
    StreamsynError,
    TakenOver,
)
from streamsyn.plain_text import message

OPENAI_PATHS: Final = ("/v1/files", "/v1/batches")
"""Below these paths, errors have the form that OpenAI's clients read."""


class Problem(StreamsynError):
    """Raised by a handler to answer with an error.

    Args:
        status: The HTTP status.
        detail: What is wrong and what to do, in one line.
        headers: Further headers of the answer.
        extra: Further members of the answer.
    """

    def __init__(
        self, status: int, detail: str, *, headers: dict[str, str] | None = None, **extra: Any
    ) -> None:
        super().__init__(message(detail))
        self.status = status
        self.headers = headers or {}
        self.extra = extra


def problem_of(error: StreamsynError) -> Problem:
    """What a client is answered when its request raised an error of ours."""
    match error:
        case Problem():
            return error
        case DirectoryInUse() | Refused() | InboxClosed() | KeyInUse():
            return Problem(409, str(error))
        case ConfigError():
            return Problem(422, str(error))
        case RowsRemoved():
            return Problem(410, str(error), first_seq=error.first_seq)
        case SinkError():
            return Problem(507, str(error))
        case StoppedEarly() | TakenOver():
            return Problem(503, str(error))
        case _:
            return Problem(502, str(error))  # of a server of the fleet


def problem_response(problem: Problem, path: str) -> web.Response:
    """The answer for a request to `path`."""
    if path.startswith(OPENAI_PATHS):
        content_type, content = "application/json", _openai_error(problem)
    else:
        content_type = "application/problem+json"
        content = {
            **problem.extra,
            "type": "about:blank",
            "title": title_of(problem.status),
            "status": problem.status,
            "detail": str(problem),
        }
    return web.Response(
        status=problem.status,
        body=orjson.dumps(content),
        content_type=content_type,
        headers=problem.headers,
    )


def title_of(status: int) -> str:
    """The phrase of an HTTP status."""
    return HTTPStatus(status).phrase


def _openai_error(problem: Problem) -> dict[str, Any]:
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    kind = "server_error" if problem.status >= 500 else kinds.get(problem.status, "invalid_request_error")
    extra = problem.extra
    error = {"message": str(problem), "type": kind, "param": extra.get("param"), "code": extra.get("code")}
    return {"error": error}
