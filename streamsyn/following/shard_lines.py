"""The lines of one shard from a row on, as the shard holds them.

Each line begins with its number, `{"seq":17,`, so that a row is found by bisection of the file: of a plain
shard at the starts of lines, of a compressed one at the starts of frames.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import orjson

from streamsyn.sink import shards
from streamsyn.sink.shards import CHUNK_BYTES

_SEQ: Final = re.compile(rb'\{"seq":(\d+)[,}]')
_BLOCK_BYTES: Final = 64 * 2**10
"""Bytes of a plain shard that are read at a time."""
_FRAME_MAGIC: Final = b"\x28\xb5\x2f\xfd"  # RFC 8878, section 3.1.1


@dataclass(slots=True)
class Cursor:
    """A position in a shard: the row `seq`, or the frame that begins with it, starts at byte `offset`."""

    shard: str = ""
    """The name of the shard once it is sealed, relative to the run directory."""
    offset: int = 0
    seq: int = 0
    searched: tuple[str, int, int] | None = None
    """An open shard that was searched for the next row in vain: name, size, time of change."""


def seq_of(line: bytes) -> int | None:
    """The number of the row in a line of a shard; None if the line is damaged.

    Its JSON is not checked as a whole, which would cost more than all the rest.
    """
    if not line.endswith(b"}\n") or b"\0" in line:  # after a loss of power, pages may be zeros
        return None
    if found := _SEQ.match(line):
        return int(found[1])
    try:
        seq = orjson.loads(line)["seq"]  # not written by us
    except (ValueError, LookupError, TypeError):
        return None
    return seq if isinstance(seq, int) else None


def read_lines(
    path: Path, cursor: Cursor, first: int, limit: int, max_bytes: int
) -> tuple[list[bytes], int | None]:
    """Up to `limit` lines of a shard from row `first` on, as far as they are whole and without gaps.

    Moves the cursor, which must be at or before that row, to where the next call may start.

    Args:
        path: The shard.
        cursor: Where to start.
        first: Number of the first row.
        limit: Maximum number of lines, at least 1.
        max_bytes: No line or frame is begun after this many bytes.

    Returns:
        The lines, and the number that stands in the place of the row after them if that is a different one;
        -1 if it is damaged, None if nothing is there yet.
    """
    read = _lines_of_frames if shards.is_compressed(path) else _plain_lines
    return read(path, cursor, first, limit, max_bytes)


def _plain_lines(
    path: Path, cursor: Cursor, first: int, limit: int, max_bytes: int
) -> tuple[list[bytes], int | None]:
    found: list[bytes] = []
    size = 0
    with path.open("rb", buffering=0) as file:
        file.seek(cursor.offset)
        rest = b""
        while block := file.read(max(_BLOCK_BYTES, len(rest))):  # twice as much for a line that is longer
            *lines, rest = shards.split(rest + block)
            if rest.endswith(b"\n"):
                lines, rest = [*lines, rest], b""
            for line in lines:
                if (seq := seq_of(line)) != cursor.seq:
                    return found, -1 if seq is None else seq
                cursor.offset += len(line)
                cursor.seq += 1
                if cursor.seq <= first:
                    continue
                found.append(line)
                size += len(line)
                if len(found) == limit or size >= max_bytes:
                    return found, None
    return found, None


def _lines_of_frames(
    path: Path, cursor: Cursor, first: int, limit: int, max_bytes: int
) -> tuple[list[bytes], int | None]:
    found: list[bytes] = []
    size = 0
    for end, data in shards.parts(path, cursor.offset):
        lines = shards.split(data)
        for at, line in enumerate(lines):
            if (seq := seq_of(line)) != cursor.seq + at:
                return found, -1 if seq is None else seq
        skipped = max(0, first - cursor.seq)
        wanted = lines[skipped : skipped + limit - len(found)]
        found += wanted
        if len(found) == limit and skipped + len(wanted) < len(lines):
            break
        cursor.offset, cursor.seq = end, cursor.seq + len(lines)
        size += sum(map(len, wanted))
        if len(found) == limit or size >= max_bytes:
            break
    return found, None


def seek(path: Path, cursor: Cursor, seq: int) -> None:
    """Move the cursor nearer to row `seq`, which must not be before it: to at most a few megabytes before it.

    Bisection: of a shard of N megabytes it reads about log2(N) lines or frames.
    """
    with path.open("rb") as file:
        end = file.seek(0, 2)
        while end - cursor.offset > 2 * CHUNK_BYTES and cursor.seq < seq:
            middle = (cursor.offset + end) // 2
            there = _row_behind(path, file, middle, end)
            if there is None or there[1] > seq:
                end = middle
            else:
                cursor.offset, cursor.seq = there


def _row_behind(path: Path, file: IO[bytes], offset: int, end: int) -> tuple[int, int] | None:
    """Where the first line or frame behind `offset` starts, and the number of its row; None if there is none
    that is whole and starts before `end`.
    """
    file.seek(offset)
    if not shards.is_compressed(path):
        start = offset + len(file.readline())
        seq = seq_of(file.readline()) if start < end else None
        return None if seq is None else (start, seq)
    while offset < end:
        data = file.read(CHUNK_BYTES)
        at = -1
        while (at := data.find(_FRAME_MAGIC, at + 1)) >= 0 and offset + at < end:
            # The magic number may also stand within a frame; what follows is then not a whole frame of rows.
            _, lines = next(shards.parts(path, offset + at), (0, b""))
            seq = seq_of(lines[: lines.find(b"\n") + 1])
            if seq is not None:
                return offset + at, seq
        if len(data) < CHUNK_BYTES:
            return None
        offset += len(data) - len(_FRAME_MAGIC) + 1
        file.seek(offset)
    return None
