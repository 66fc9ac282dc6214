"""The bytes of a file, decompressed as its content says, in chunks of a bounded size."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final, Protocol

from streamsyn.io.places import RemoteFile, opened

CHUNK_BYTES: Final = 256 * 1024
_ZSTD_CHUNK_BYTES: Final = 64
"""Compressed bytes that are decompressed at once: four can stand for a block of 128 KiB."""
_MAGIC_BYTES: Final = 6
READ_ERRORS: Final = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a file may raise, compressed or not."""
SUFFIXES: Final = (".gz", ".zst", ".bz2", ".xz")
"""The endings of compressed files, behind that of the format. The content decides, whatever the name is."""


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


def file_chunks(place: Path | RemoteFile, on_read: Callable[[int], None] | None = None) -> Iterator[bytes]:
    """The decompressed bytes of a file.

    Args:
        place: The file.
        on_read: Called with the offset that has been read to, in bytes of the file, for each chunk.

    Raises:
        OSError, EOFError, zlib.error, LZMAError: The file cannot be read (`READ_ERRORS`), is damaged, or is
            cut short. Everything before the damage has been yielded.
    """
    with opened(place) as file:
        head = file.read(_MAGIC_BYTES)
        reader = _reader_of(head)
        suffix = PurePosixPath(place.name.lower()).suffix
        if reader is _plain_chunks and suffix in SUFFIXES and head.strip() and head.strip()[:1] not in b"{[":
            raise OSError(f"it is not compressed as the ending {suffix} says")
        for chunk in reader(_Rejoined(head, file)):
            if on_read is not None:
                on_read(file.tell())
            yield chunk


class _Rejoined:
    """A file from its beginning, after the first bytes were read: a stream over HTTP cannot go back."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head = head
        self._rest = rest

    def read(self, size: int = -1, /) -> bytes:
        if not self._head:
            return self._rest.read(size)
        data, self._head = self._head[:size], self._head[size:]
        return data + self._rest.read(size - len(data)) if len(data) < size else data


def is_compressed(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a compression."""
    return _reader_of(head[:_MAGIC_BYTES]) is not _plain_chunks


def _reader_of(head: bytes) -> Callable[[_Readable], Iterator[bytes]]:
    """The reader of a compression, by the first bytes of a file."""
    if head.startswith(b"\x1f\x8b"):
        return _gzip_chunks
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F):
        return _zstd_chunks
    if head.startswith(b"BZh") and head[3:4].isdigit():
        return _bz2_chunks
    return _xz_chunks if head == b"\xfd7zXZ\x00" else _plain_chunks


def _plain_chunks(raw: _Readable) -> Iterator[bytes]:
    while chunk := raw.read(CHUNK_BYTES):
        yield chunk


def _gzip_chunks(raw: Any) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw, mode="rb") as stream:
        # `read1` returns what comes before a damaged place; `read` would lose it with its error.
        while chunk := stream.read1(CHUNK_BYTES):
            yield chunk


def _bz2_chunks(raw: Any) -> Iterator[bytes]:
    with bz2.BZ2File(raw) as stream:
        while chunk := stream.read1(CHUNK_BYTES):
            yield chunk


def _xz_chunks(raw: Any) -> Iterator[bytes]:
    with lzma.LZMAFile(raw) as stream:
        while chunk := stream.read1(CHUNK_BYTES):
            yield chunk


def _zstd_chunks(raw: _Readable) -> Iterator[bytes]:
    import zstandard

    # The package's stream reader does not notice that a file is cut short.
    frame = None
    try:
        while pending := raw.read(_ZSTD_CHUNK_BYTES):
            while pending:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                if chunk := frame.decompress(pending):
                    yield chunk
                pending = frame.unused_data
                frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("the last zstd frame has no end")
    except zstandard.ZstdError as error:
        raise OSError(f"invalid zstd data: {error}") from error
