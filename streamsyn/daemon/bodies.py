"""The bodies of requests: read within limits of size and time, and checked against a model."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Final, TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from streamsyn.config.command_sections import ServeSection
from streamsyn.config.loading import describe
from streamsyn.daemon.problems import Problem

MAX_JSON_BYTES: Final = 2**20
"""Longest body of JSON: a run's configuration with its templates, for example."""
_CHUNK_BYTES: Final = 2**16

M = TypeVar("M", bound=BaseModel)

Limits = Callable[[], ServeSection]
LIMITS: Final[web.AppKey[Limits]] = web.AppKey("limits")
"""Returns the limits as they are now."""


class JsonBody(BaseModel):
    """A body of a request: without unknown members, and without conversions of types."""

    model_config = ConfigDict(extra="forbid", strict=True)


async def pieces(request: web.Request, max_bytes: int) -> AsyncIterator[bytes]:
    """The body of a request as it arrives, in pieces as they were sent: compressed, if it is.

    Raises:
        Problem: 413: it is longer than `max_bytes`; 408: the client stopped sending; 400: it went away, or
            sent something that is not HTTP.
    """
    if request.content_length is not None and request.content_length > max_bytes:
        raise _too_long(max_bytes)
    size, timeout_s = 0, request.app[LIMITS]().body_timeout_s
    while True:
        try:
            async with asyncio.timeout(timeout_s):
                piece = await request.content.read(_CHUNK_BYTES)
        except TimeoutError:
            raise Problem(408, f"no further piece of the body came within {timeout_s:g} s") from None
        except (OSError, web.PayloadAccessError, web.RequestPayloadError) as error:
            raise Problem(400, f"the body is incomplete: {error}") from error
        if not piece:
            return
        size += len(piece)
        if size > max_bytes:
            raise _too_long(max_bytes)
        yield piece


async def json_body(request: web.Request, model: type[M], *, is_optional: bool = False) -> M:
    """The body of a request, as a model.

    Args:
        request: The request.
        model: What it must be.
        is_optional: Whether no body at all is the model with its defaults.

    Raises:
        Problem: 400, 408, 413, 415 or 422: the body is not what it should be.
    """
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Problem(415, "a JSON body must not be compressed")
    data = b"".join([piece async for piece in pieces(request, MAX_JSON_BYTES)])
    if not data and is_optional:
        return model()
    if request.content_type != "application/json":
        raise Problem(415, f"expected Content-Type: application/json (got {request.content_type[:100]!r})")
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise Problem(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise Problem(422, "the body must be a JSON object")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=True)
        raise Problem(422, "; ".join(describe(problems[:5], list(model.model_fields)))) from error


def _too_long(max_bytes: int) -> Problem:
    return Problem(413, f"the body is longer than {max_bytes:,} bytes")
