"""Whole rows of a shard that may still grow, from any offset on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

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
    for end, some in frames.scan(path, cursor.offset):
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
