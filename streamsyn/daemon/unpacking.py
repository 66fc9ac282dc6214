"""Compressed bodies of requests, unpacked piece by piece in bounded memory."""

import zlib
from typing import Any, Final, Protocol

from streamsyn.daemon.problems import Problem

CODINGS: Final = ("gzip", "zstd")
"""What `Content-Encoding` may name, besides `identity`."""
_CHUNK_BYTES: Final = 2**18
_ZSTD_STEP_BYTES: Final = 64
"""Compressed bytes that are unpacked at once: four can stand for a block of 128 KiB."""
_ZSTD_WINDOW_BYTES: Final = 2**23
"""The largest window that a body may need (RFC 9659)."""
_GZIP_WINDOW_BITS: Final = 31


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
                chunk: bytes = self._member.decompress(self._rest, _CHUNK_BYTES)
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
            while self._rest and size < _CHUNK_BYTES:
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
