"""Rows into files: one row of shards for each split, within a bounded amount of memory."""

from collections.abc import Callable
from dataclasses import dataclass, field

from streamsyn.export.formats import RowFile, open_rows, suffix
from streamsyn.export.request import ExportRequest
from streamsyn.export.rows import Row, text_bytes
from streamsyn.export.splits import Split
from streamsyn.export.target import Target, TargetFile

HELD_BYTES = 256 * 2**20
"""What all files together may hold back."""


@dataclass(slots=True)
class Shards:
    """The files of one split."""

    stem: str
    names: list[str] = field(default_factory=list)
    rows: int = 0
    shard_rows: int = 0
    shard_bytes: int = 0
    file: TargetFile | None = None
    writer: RowFile | None = None


class ShardWriter:
    """Writes rows to the shards of their splits.

    Args:
        target: The folder.
        request: Says in which format, and how large a shard may be.
        stem: The beginning of the names of a split's files.
    """

    def __init__(self, target: Target, request: ExportRequest, stem: Callable[[Split], str]) -> None:
        self._target = target
        self._request = request
        self._stem = stem
        self._suffix = suffix(request.format, request.codec)
        self.splits: dict[Split, Shards] = {}

    def write(self, split: Split, row: Row) -> int:
        """Add a row; its bytes before compression."""
        if split not in self.splits:
            self.splits[split] = Shards(self._stem(split))
        shards, size = self.splits[split], text_bytes(row)
        writer = shards.writer or self._begin(shards)
        writer.write(row, size)
        shards.rows += 1
        shards.shard_rows += 1
        shards.shard_bytes += size
        if shards.shard_bytes >= self._request.shard_bytes or shards.shard_rows == self._request.shard_rows:
            self._end(shards)
        self._keep_in_bounds()
        return size

    def close(self) -> None:
        """Write what is held back."""
        for shards in self.splits.values():
            self._end(shards)

    def abandon(self) -> None:
        """Let files be as they are: another error is on its way."""
        for shards in self.splits.values():
            if shards.file is not None:
                shards.file.abandon()

    def _begin(self, shards: Shards) -> RowFile:
        name = f"{shards.stem}-{len(shards.names):05d}{self._suffix}"
        shards.names.append(name)
        shards.file = self._target.open(name)
        shards.writer = open_rows(shards.file, self._request.format, self._request.codec)
        return shards.writer

    def _end(self, shards: Shards) -> None:
        if shards.file is None or shards.writer is None:
            return
        shards.writer.close()
        shards.file.close()
        self._target.note(shards.names[-1], shards.file, shards.shard_rows)
        shards.file = shards.writer = None
        shards.shard_rows = shards.shard_bytes = 0

    def _keep_in_bounds(self) -> None:
        """Have the one that holds back most write it, when there is too much."""
        writers = [shards.writer for shards in self.splits.values() if shards.writer is not None]
        if sum(writer.held_bytes for writer in writers) > HELD_BYTES:
            max(writers, key=lambda writer: writer.held_bytes).flush()
