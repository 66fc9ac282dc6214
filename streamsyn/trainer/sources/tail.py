"""Whole rows of a shard that may still grow, from any offset on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import orjson

from streamsyn.sink import frames

Rows: TypeAlias = list[dict[str, Any]]


@dataclass(slots=True)
class Cursor:
    """A place in a shard: at `offset` begins the row `seq`, or the frame that begins with it."""

    shard: str = ""
    """The shard's name when it is sealed."""
    offset: int = 0
    seq: int = 0


def read_rows(path: Path, cursor: Cursor, first: int, limit: int) -> tuple[Rows, int | None]:
    """Rows of a shard from row `first` on, `limit` at most, as far as they are whole and follow each other.

    The cursor, at or before that row, goes on to where the next call may begin.

    Returns:
        The rows, and the seq of one that stands where another ought to: None when there is no such.
    """
    found: Rows = []
    for end, some in scan(path, cursor.offset):
        for at, row in enumerate(some):
            if row.get("seq") != cursor.seq + at:
                return found, row.get("seq", -1)
        wanted = [row for row in some if row["seq"] >= first][: limit - len(found)]
        found += wanted
        if len(found) == limit and wanted and wanted[-1] is not some[-1]:
            break
        cursor.offset, cursor.seq = end, cursor.seq + len(some)
        if len(found) == limit:
            break
    return found, None


def scan(path: Path, start: int) -> Iterator[tuple[int, Rows]]:
    """Rows of a shard from an offset on, each time with the offset behind them; ends before what is torn."""
    split = _zstd_frames if ".zst" in path.suffixes else _lines
    window = frames.CHUNK_BYTES
    with path.open("rb") as file:
        while True:
            file.seek(start)
            data = file.read(window)
            used = 0
            for used, lines in split(data):
                rows = _decode(lines)
                if rows is None:
                    return
                yield start + used, rows
            if len(data) < window:
                return
            start += used
            window = frames.CHUNK_BYTES if used else 2 * window


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    begin = 0
    while end := data.find(b"\n", begin) + 1:
        yield end, data[begin:end]
        begin = end


def _zstd_frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    import zstandard

    left = data
    while left:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            text = frame.decompress(left)
        except zstandard.ZstdError:
            return
        if not frame.eof:
            return
        left = frame.unused_data
        yield len(data) - len(left), text


def _decode(lines: bytes) -> Rows | None:
    try:
        rows = [orjson.loads(line) for line in lines.splitlines()]
    except orjson.JSONDecodeError:
        return None
    return rows if all(isinstance(row, dict) for row in rows) else None
