"""The content of a file: what its beginning says about all of it, and its bytes or text, decompressed."""

import bz2
import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from enum import Enum
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final, Protocol

import orjson

from streamsyn.io.places import RemoteFile, opened
from streamsyn.io.rows import BOM, ReadOptions

CHUNK_BYTES: Final = 256 * 1024
_ZSTD_CHUNK_BYTES: Final = 64
"""Compressed bytes that are decompressed at once: four can stand for a block of 128 KiB."""
_MAGIC_BYTES: Final = 6
READ_ERRORS: Final = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a file may raise, compressed or not."""
SUFFIXES: Final = (".gz", ".zst", ".bz2", ".xz")
"""The endings of compressed files, behind that of the format. The content decides, whatever the name is."""
HEAD_BYTES: Final = 64 * 1024
"""Bytes of the beginning of a file that are looked at."""
_LATIN1_ADVICE: Final = "convert it: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
_FIRST_BYTES: Final = (
    (
        b"version https://git-lfs.github.com/spec/",
        "is a Git LFS pointer, not the data: run `git lfs pull`, or download the file itself",
    ),
    (b"\xff\xfe\x00\x00", "is UTF-32, not UTF-8; convert it: iconv -f UTF-32 -t UTF-8 FILE > NEW"),
    (b"\xff\xfe", "is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    (b"\xfe\xff", "is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    (b"PK\x03\x04", "is a zip archive; unpack it first"),
    (b"PAR1", "is Parquet; give it the ending .parquet"),
)


class Layout(Enum):
    """How the rows of a JSON file are laid out."""

    LINES = "one value a line"
    ARRAY = "one array"
    DOCUMENT = "one object over several lines"


def problem_of(head: bytes, *, of_rows: bool = True) -> str | None:
    """Why a file cannot be one of text in UTF-8, with what to do; None if it may be one.

    Args:
        head: Up to `HEAD_BYTES` from its beginning, decompressed.
        of_rows: Whether it should have rows: then it is not a web page.
    """
    problem = next((problem for first, problem in _FIRST_BYTES if head.startswith(first)), None)
    if problem is not None:
        return problem
    if of_rows and head[:64].removeprefix(BOM).lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, not the data: download the file itself"
    if 4 * head[:400].count(b"\0") > len(head[:400]):
        return "is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"
    return f"is Latin-1 (or Windows-1252), not UTF-8; {_LATIN1_ADVICE}" if _is_latin1(head) else None


def encoding_hint(text: bytes) -> str:
    """What a line that is not UTF-8 probably is, with what to do; "" if that is not clear."""
    return f"; it looks like Latin-1: {_LATIN1_ADVICE}" if _is_latin1_line(text) else ""


def layout_of(head: bytes) -> Layout:
    """The layout of a JSON file.

    Args:
        head: Up to `HEAD_BYTES` from its beginning, decompressed.
    """
    text = head.removeprefix(BOM).lstrip()
    first, newline, rest = text.partition(b"\n")
    if not text.startswith((b"[", b"{")) or (_is_json(first) and rest.strip()):
        return Layout.LINES
    if text.startswith(b"["):
        return Layout.ARRAY
    is_cut = len(head) >= HEAD_BYTES
    return Layout.DOCUMENT if newline and _goes_on(text, len(first), is_cut=is_cut) else Layout.LINES


def _goes_on(text: bytes, first: int, *, is_cut: bool) -> bool:
    """Whether the JSON object at the beginning of a text goes on behind its first line, of `first` bytes."""
    shown = text.decode(errors="replace")
    try:
        _, end = json.JSONDecoder(strict=False).raw_decode(shown)
    except RecursionError:
        return False
    except json.JSONDecodeError as error:
        # A text that was cut fails at its end, or at the string that has no end.
        is_open = error.pos >= len(shown) - 8 or error.msg.startswith("Unterminated")
        return is_cut and is_open and error.pos > first
    return end > first


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _is_latin1(head: bytes) -> bool:
    """Whether lines are valid in Latin-1 alone: some are, and no line has other characters in UTF-8."""
    if head.isascii():
        return False
    *lines, last = head.split(b"\n")
    if len(head) < HEAD_BYTES:
        lines.append(last)  # otherwise it was cut, perhaps within a character
    lines = [line for line in lines if line.strip()]
    other = [line for line in lines if not line.isascii()]
    wrong = [line for line in other if not is_utf8(line)]
    return (
        bool(wrong)
        and len(wrong) == len(other)
        and all(map(_is_latin1_line, wrong))
        and (
            len(wrong) > 1 or len(lines) <= 2  # a lone line among others is for its own reject
        )
    )


def _is_latin1_line(line: bytes) -> bool:
    """Whether a line that is not UTF-8 makes sense in Latin-1: printable, with letters beyond ASCII."""
    text = line.decode("cp1252", "replace")
    other = [character for character in text if character > "\x7f"]
    letters = sum(character.isalpha() for character in other)
    return (
        "\ufffd" not in text
        and bool(letters)
        and any(before.isascii() and before.isalpha() and after > "\x7f" for before, after in pairwise(text))
    )


def is_utf8(line: bytes) -> bool:
    """Whether some bytes are valid UTF-8."""
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


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


def read_text(
    place: Path | RemoteFile,
    options: ReadOptions,
    on_read: Callable[[int], None] | None = None,
    *,
    of_rows: bool = False,
) -> Iterator[str]:
    """The text of a file in UTF-8, compressed or not, in pieces that may end anywhere.

    Args:
        place: The file.
        options: For messages.
        on_read: Called with the offset that has been read to.
        of_rows: Whether the file has rows, not plain text.

    Raises:
        ConfigError: It cannot be read to its end, or is not valid UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    chunk = b""
    try:
        for number, chunk in enumerate(file_chunks(place, on_read)):
            if not number and (problem := problem_of(chunk[:HEAD_BYTES], of_rows=of_rows)) is not None:
                raise options.error(place, problem)
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line = next((line for line in chunk.split(b"\n") if not is_utf8(line)), b"")
        raise options.error(place, f"is not valid UTF-8: {error}{encoding_hint(line)}") from error
    except READ_ERRORS as error:
        raise options.error(place, f"cannot be read to its end: {error}") from error
