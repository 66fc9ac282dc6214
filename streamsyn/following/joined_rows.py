"""The rows of OUT as one, whether it is a run directory or has partitions."""

from pathlib import Path
from typing import Any, Final

from streamsyn.errors import RunReplaced
from streamsyn.following.run_rows import Rows, RunRows
from streamsyn.following.shard_lines import Cursor
from streamsyn.sink.partitions import FILE, Partitions, place_of, read_partitions
from streamsyn.sink.shards import CHUNK_BYTES

_AHEAD: Final = 64
"""Rows of each partition that are read together."""
_BATCH: Final = 256
"""Maximum number of rows in one answer."""


class JoinedRows:
    """The rows of one kind that a run writes, numbered from 0: `RunRows`, with partitions as one.

    With partitions, a row's `seq` is its number in the order of all; `partition` and `partition_seq` name it
    within its partition, to which its `context_seqs` belong. A partition that is behind holds up those that
    are ahead. All methods block on the disk. For one thread at a time.

    Args:
        root: The run directory, which need not exist yet.
        kind: `samples`, `contexts` or `rejects`.
        run: The run that is expected; None for whichever is there first.

    Raises (all methods):
        RunReplaced, RowsRemoved, ConfigError, SinkError: As `RunRows`.
    """

    def __init__(self, root: Path, kind: str = "samples", run: float | None = None) -> None:
        self.root = root
        self.kind = kind
        self._single = RunRows(root, kind, run)
        self._run = run
        self._file: tuple[int, ...] = ()
        """Identifies the file partitions.json read last; empty before there was one."""
        self._partitions: Partitions | None = None
        self._parts: list[_Part] = []

    @property
    def run(self) -> float | None:
        """Identifies the run: when it was created; None while there is none."""
        return self._single.run if self._partitions is None else self._run

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders in which files change when rows come."""
        parts = [part.rows for part in self._parts] or [self._single]
        return self.root, *(folder for part in parts for folder in part.folders)

    def total(self) -> int | None:
        """Number of rows when the run has ended; None while more may come."""
        partitions = self._update()
        if partitions is None:
            return self._single.total()
        totals = [total for total in partitions.totals(self.kind) if total is not None]
        return sum(totals) if partitions.has_ended else None

    def rows(self, first: int, limit: int, cursor: Cursor | None = None) -> Rows:
        """The rows `first`, `first + 1`, ...: at least one, or none if row `first` is not written yet.

        Args:
            first: Number of the first row.
            limit: Maximum number of rows; fewer are returned where they are long.
            cursor: Of a reader that is elsewhere in the rows; not needed, but faster.
        """
        while True:
            partitions = self._update()
            if partitions is None:
                return self._single.rows(first, limit, cursor=cursor)
            found = self._joined(partitions, first, min(limit, _BATCH))
            if self._update() is partitions:  # else a row may have been taken for one of an earlier round
                return found

    def part(self, number: int | None) -> RunRows:
        """The rows of one partition; of the run directory itself if `number` is None."""
        self._update()
        return self._single if number is None else self._parts[number].rows

    def _joined(self, partitions: Partitions, first: int, limit: int) -> Rows:
        ends, totals = partitions.ends(self.kind), partitions.totals(self.kind)
        found: Rows = []
        for number in range(first, first + limit):
            place = place_of(number, ends, totals)
            row = None if place is None else self._parts[place[0]].row(place[1])
            if place is None or row is None:
                break
            found.append({**row, "seq": number, "partition": place[0], "partition_seq": place[1]})
        return found

    def _update(self) -> Partitions | None:
        """Read partitions.json if it has changed."""
        try:
            status = (self.root / FILE).stat()
        except (FileNotFoundError, NotADirectoryError):
            return self._partitions
        file = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if file != self._file and (found := read_partitions(self.root)) is not None:
            if self._run not in (None, found.created_at):
                raise RunReplaced(f"{self.root} now holds a different run than before")
            if not self._parts:
                max_bytes = CHUNK_BYTES // found.number
                self._parts = [_Part(path, self.kind, max_bytes) for path in found.directories]
            self._file, self._run, self._partitions = file, found.created_at, found
        return self._partitions


class _Part:
    """The rows of one partition, read some at a time."""

    def __init__(self, root: Path, kind: str, max_bytes: int) -> None:
        self.rows = RunRows(root, kind)
        self._max_bytes = max_bytes
        self._first = 0
        self._held: list[dict[str, Any]] = []

    def row(self, number: int) -> dict[str, Any] | None:
        """A row by its number in the partition; None if it is not written yet."""
        if not 0 <= number - self._first < len(self._held):
            self._first, self._held = number, self.rows.rows(number, _AHEAD, self._max_bytes)
        return self._held[number - self._first] if self._held else None
