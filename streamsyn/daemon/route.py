"""Routes as data, from which the application, the scopes and the OpenAPI document are made."""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import orjson
from aiohttp import web
from pydantic import BaseModel

from streamsyn.daemon.problems import Problem

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Scope = Literal["open", "read", "write", "admin"]
"""`open` needs no token; each of the others includes those before it."""
Body = type[BaseModel] | str | None
"""A model for JSON, or a media type, or nothing."""

ID: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9_-])?")
"""What an id looks like: it cannot leave its directory, nor be hidden in it."""
PROBLEM: Final = "application/problem+json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One method of one path.

    Attributes:
        method: The HTTP method.
        path: The path, with its variables in braces, as aiohttp and OpenAPI both write it.
        handler: Answers the request; raises a Problem, or any of our errors, for one that it refuses.
        scope: The scope that a client needs.
        summary: What it does, in one sentence.
        body: What the request's body is: a model, or the media types that are accepted, joined by commas.
        body_is_required: Whether a request without a body is refused.
        answers: What is answered, by status, besides problems.
        problems: The statuses of problems that the handler answers with itself.
        query: The parameters of the query, with their types: str, int or bool.
        headers: Headers that it reads.
    """

    method: str
    path: str
    handler: Handler
    scope: Scope
    summary: str
    body: Body = None
    body_is_required: bool = True
    answers: Mapping[int, Body] = field(default_factory=dict)
    problems: tuple[int, ...] = ()
    query: Mapping[str, type[str] | type[int] | type[bool]] = field(default_factory=dict)
    headers: tuple[str, ...] = ()

    @property
    def operation_id(self) -> str:
        """Its name in the OpenAPI document, such as `post_v1_runs_id_close`."""
        return "_".join([self.method.lower(), *re.findall(r"\w+", self.path)])


def checked_id(text: str, what: str = "run") -> str:
    """Return an id that a client chose.

    Raises:
        Problem: 422: it is not a valid id.
    """
    if ID.fullmatch(text) is None:
        raise Problem(
            422,
            f"{text[:100]!r} is not a valid id of a {what}: use 1 to 64 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or a digit, and not ending in a dot",
        )
    return text


def integer(request: web.Request, name: str, default: int, *, least: int, most: int) -> int:
    """Return a parameter of the query as an integer.

    Raises:
        Problem: 422: it is not an integer, or out of range.
    """
    text = request.query.get(name)
    if text is None:
        return default
    if len(text) > 20 or not re.fullmatch(r"-?[0-9]+", text) or not least <= int(text) <= most:
        raise Problem(422, f"{name}: expected an integer from {least} to {most} (got {text[:40]!r})")
    return int(text)


def boolean(request: web.Request, name: str) -> bool:
    """Return a parameter of the query as a boolean; absent is false.

    Raises:
        Problem: 422: it is not a boolean.
    """
    text = request.query.get(name, "false").lower()
    if text not in {"1", "true", "0", "false"}:
        raise Problem(422, f"{name}: expected true or false (got {text[:40]!r})")
    return text in {"1", "true"}


def one_of(request: web.Request, name: str, values: tuple[str, ...]) -> str | None:
    """Return a parameter of the query that has a few values; None if it is absent.

    Raises:
        Problem: 422: it has a different value.
    """
    text = request.query.get(name)
    if text is not None and text not in values:
        raise Problem(422, f"{name}: expected one of {', '.join(values)} (got {text[:40]!r})")
    return text


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """An answer in JSON."""
    return web.Response(
        status=status, body=orjson.dumps(value), content_type="application/json", headers=headers
    )
