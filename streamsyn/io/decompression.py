"""The bytes of a file, decompressed as its name says, in chunks of a bounded size."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

CHUNK_BYTES: Final = 256 * 1024
_ZSTD_CHUNK_BYTES: Final = 64
"""Compressed bytes that are decompressed at once: four can stand for a block of 128 KiB."""
READ_ERRORS: Final = (OSError, EOFError, zlib.error)
"""What reading a file may raise, compressed or not."""


def file_chunks(path: Path, on_read: Callable[[int], None] | None = None) -> Iterator[bytes]:
    """The decompressed bytes of a file.

    Args:
        path: Its suffix names the compression; any other than those of `COMPRESSIONS` means none.
        on_read: Called with the offset that has been read to, in bytes of the file, for each chunk.

    Raises:
        OSError, EOFError, zlib.error: The file cannot be read (`READ_ERRORS`), is damaged, or is cut short.
            Everything before the damage has been yielded.
    """
    with path.open("rb") as raw:
        for chunk in COMPRESSIONS.get(path.suffix, _plain_chunks)(raw):
            if on_read is not None:
                on_read(raw.tell())
            yield chunk


def _plain_chunks(raw: IO[bytes]) -> Iterator[bytes]:
    while chunk := raw.read(CHUNK_BYTES):
        yield chunk


def _gzip_chunks(raw: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw) as stream:
        # `read1` returns what comes before a damaged place; `read` would lose it with its error.
        while chunk := stream.read1(CHUNK_BYTES):
            yield chunk


def _zstd_chunks(raw: IO[bytes]) -> Iterator[bytes]:
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


COMPRESSIONS: Final[dict[str, Callable[[IO[bytes]], Iterator[bytes]]]] = {
    ".gz": _gzip_chunks,
    ".zst": _zstd_chunks,
}
"""How each compression is read, by the suffix that stands behind the format's own."""
