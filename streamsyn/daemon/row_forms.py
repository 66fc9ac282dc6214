"""How rows look on the wire: NDJSON or server-sent events, as they are or compressed.

The rows of a piece are encoded once for all readers that want the same form. So a compressed piece depends
on no other one: a zstd piece is a frame of its own (RFC 8878, 3), and a gzip piece is a sequence of deflate
blocks that refer to nothing before them and end at a whole byte (RFC 1951, 3.2). A connection adds what is
its own: the header of the gzip member, and its trailer, which has the checksum of all that was sent.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import zstandard

Framing = Literal["ndjson", "sse"]
Coding = Literal["identity", "gzip", "zstd"]

_GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
"""Deflate, no name, no time, unknown system (RFC 1952, 2.3)."""
_LAST_BLOCK = b"\x03\0"
"""An empty deflate block that is the last one."""
_GZIP_LEVEL = 1  # rows wait for this; level 6 takes four times as long for a seventh less
_ZSTD_LEVEL = 3


@dataclass(frozen=True, slots=True)
class Encoded:
    """Some bytes of a stream.

    Attributes:
        body: What is sent.
        plain: The same before it was compressed.
    """

    body: bytes
    plain: bytes

    @property
    def size(self) -> int:
        """Bytes of memory that it takes."""
        return len(self.body) + (0 if self.plain is self.body else len(self.plain))


@dataclass(frozen=True, slots=True)
class RowForm:
    """A framing of rows, and the coding of its bytes."""

    framing: Framing = "ndjson"
    coding: Coding = "identity"

    def rows(self, first: int, lines: Sequence[bytes]) -> Encoded:
        """Encode rows.

        Args:
            first: The `seq` of the first one.
            lines: Each as its line of JSON, with the line end.
        """
        if self.framing == "ndjson":
            return self.text(b"".join(lines))
        return self.text(b"".join(b"id: %d\ndata: %s\n" % one for one in enumerate(lines, first)))

    def text(self, plain: bytes) -> Encoded:
        """Encode bytes that are framed already."""
        match self.coding:
            case "identity":
                return Encoded(plain, plain)
            case "zstd":
                return Encoded(zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(plain), plain)
            case "gzip":
                deflate = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
                return Encoded(deflate.compress(plain) + deflate.flush(zlib.Z_SYNC_FLUSH), plain)


class Envelope:
    """What one connection adds around the pieces it sends: the header and the trailer of a gzip member."""

    def __init__(self, coding: Coding) -> None:
        self._is_gzip = coding == "gzip"
        self._crc = 0
        self._size = 0

    def begin(self) -> bytes:
        """What is sent before the first piece."""
        return _GZIP_HEADER if self._is_gzip else b""

    def add(self, piece: Encoded) -> None:
        """Count a piece that is sent."""
        if self._is_gzip:
            self._crc = zlib.crc32(piece.plain, self._crc)
            self._size += len(piece.plain)

    def end(self) -> bytes:
        """What is sent after the last piece of a stream that is complete."""
        if not self._is_gzip:
            return b""
        return _LAST_BLOCK + self._crc.to_bytes(4, "little") + (self._size % 2**32).to_bytes(4, "little")
