"""The bodies of requests: read within limits of size and time, unpacked, and checked against a model.

Compressed bodies are unpacked piece by piece in bounded memory.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, Protocol, TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from streamsyn.config.command_sections import ServeSection
from streamsyn.config.loading import describe
from streamsyn.daemon.problems import Problem

MAX_JSON_BYTES: Final = 2**20
"""Longest body of JSON: a run's configuration with its templates, for example."""
_PIECE_BYTES: Final = 2**16

CODINGS: Final = ("gzip", "zstd")
"""What `Content-Encoding` may name, besides `identity`."""
_UNPACKED_BYTES: Final = 2**18
_ZSTD_STEP_BYTES: Final = 64
"""Compressed bytes that are unpacked at once: four can stand for a block of 128 KiB."""
_ZSTD_WINDOW_BYTES: Final = 2**23
"""The largest window that a body may need (RFC 9659)."""
_GZIP_WINDOW_BITS: Final = 31

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
                piece = await request.content.read(_PIECE_BYTES)
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


class Unpacker(Protocol):
    """Takes a body in pieces and returns its content in chunks. For one thread at a time."""

    def feed(self, piece: bytes) -> None:
        """Take the next piece of the body."""
        ...

    @property
    def has_more(self) -> bool:
        """Whether to call `chunk` before the next piece."""
        ...

    def chunk(self) -> bytes:
        """The next part of the content, of a bounded size; it may be empty.

        Raises:
            Problem: 400: the body is damaged.
        """
        ...

    def end(self) -> None:
        """The body is complete.

        Raises:
            Problem: 400: it is cut short.
        """
        ...


def unpacker(coding: str) -> Unpacker:
    """The unpacker for the value of `Content-Encoding`, "" if there is none.

    Raises:
        Problem: 415: it is not one of `CODINGS`.
    """
    match coding.strip().lower():
        case "" | "identity":
            return _Plain()
        case "gzip" | "x-gzip":
            return _Gzip()
        case "zstd":
            return _Zstd()
        case other:
            raise Problem(
                415,
                f"Content-Encoding: {other[:40]!r} is not supported; use {' or '.join(CODINGS)}, or none",
                headers={"Accept-Encoding": ", ".join(CODINGS)},  # RFC 9110, section 15.5.16
            )


class _Plain:
    def __init__(self) -> None:
        self._piece = b""

    def feed(self, piece: bytes) -> None:
        self._piece = piece

    @property
    def has_more(self) -> bool:
        return bool(self._piece)

    def chunk(self) -> bytes:
        piece, self._piece = self._piece, b""
        return piece

    def end(self) -> None:
        """Whatever has come is a body."""


class _Gzip:
    """One gzip member after the other, as RFC 1952 has it."""

    def __init__(self) -> None:
        self._member: Any = None
        self._rest = b""

    def feed(self, piece: bytes) -> None:
        self._rest += piece

    @property
    def has_more(self) -> bool:
        return bool(self._rest)

    def chunk(self) -> bytes:
        try:
            while self._rest:
                if self._member is None:
                    self._member = zlib.decompressobj(_GZIP_WINDOW_BITS)
                chunk: bytes = self._member.decompress(self._rest, _UNPACKED_BYTES)
                self._rest = self._member.unconsumed_tail
                if self._member.eof:
                    self._rest, self._member = self._member.unused_data, None
                if chunk:
                    return chunk
        except zlib.error as error:
            raise Problem(400, f"the body is not valid gzip: {error}") from error
        return b""

    def end(self) -> None:
        if self._member is not None:
            raise Problem(400, "the body is cut short: its gzip stream has no end")


class _Zstd:
    """One zstd frame after the other, as RFC 8878 has it."""

    def __init__(self) -> None:
        self._frame: Any = None
        self._rest = memoryview(b"")

    def feed(self, piece: bytes) -> None:
        self._rest = memoryview(bytes(self._rest) + piece)

    @property
    def has_more(self) -> bool:
        return bool(self._rest)

    def chunk(self) -> bytes:
        import zstandard

        chunks, size = [], 0
        try:
            while self._rest and size < _UNPACKED_BYTES:
                if self._frame is None:
                    unpacks = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
                    self._frame = unpacks.decompressobj()
                step = self._rest[:_ZSTD_STEP_BYTES]
                chunk = self._frame.decompress(step)
                used = len(step)
                if self._frame.eof:
                    used -= len(self._frame.unused_data)
                    self._frame = None
                self._rest = self._rest[used:]
                chunks.append(chunk)
                size += len(chunk)
        except zstandard.ZstdError as error:
            raise Problem(400, f"the body is not valid zstd: {error}") from error
        return b"".join(chunks)

    def end(self) -> None:
        if self._frame is not None:
            raise Problem(400, "the body is cut short: its last zstd frame has no end")
