"""The log of one kind of record: a row of sealed shards and one that is open."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from streamsyn.errors import SinkError
from streamsyn.records import Context, Reject, Sample, draft_key
from streamsyn.sections import SinkSection
from streamsyn.sink.frames import SUFFIXES
from streamsyn.sink.manifest import Manifest, SealedShard
from streamsyn.sink.shard import OPEN_SUFFIX, OpenShard

KINDS = ("contexts", "rejects", "samples")
Record = Context | Reject | Sample


def row_key(row: dict[str, Any]) -> bytes:
    """The key of the draft (or bad line) that a row of contexts or rejects finishes."""
    if key := row.get("key"):
        return bytes.fromhex(key)
    return draft_key(row["seed_id"], row["draft"])


_MAX_ROWS = 64
"""Rows written at once: bounds the buffer for samples of many MB."""


class ShardLog:
    """Appends records of one kind, gives each its `seq`, and seals shards by size.

    Not for two threads at a time. Every method may block on the disk and may raise SinkError.

    Args:
        root: The run directory.
        kind: One of KINDS; names the folder.
        manifest: Told of each sealed shard.
        on_sealed: Called with each sealed shard and the keys of its rows.
    """

    def __init__(
        self,
        root: Path,
        kind: str,
        manifest: Manifest,
        sink: SinkSection,
        on_sealed: Callable[[SealedShard, bytes], None] | None = None,
    ) -> None:
        self._root = root
        self._kind = kind
        self._manifest = manifest
        self._sink = sink
        self._on_sealed = on_sealed
        self._keys = bytearray()
        self._shard: OpenShard | None = None
        sealed = manifest.of_kind(kind)
        self._number = len(sealed)
        self.rows = sealed[-1].last_seq + 1 if sealed else 0
        """Rows in the log, sealed or not; also the seq of the next one."""

    def recover(self) -> list[dict[str, Any]]:
        """Take up the open shard that an earlier run left; the rows in it, less their long texts."""
        with _translated(f"take up {self._kind} in {self._root}"):
            path = self._path(self._number)
            open_path = path.with_name(path.name + OPEN_SUFFIX)
            self._refuse_unlisted(beyond=path)
            if path.exists():  # killed between the new name and the manifest's line
                path.rename(open_path)
            if not open_path.exists():
                return []
            self._shard = OpenShard(path, self._kind, self.rows)
            kept = self._shard.recover()
        self.rows = self._shard.next_seq
        if self._on_sealed is not None:
            for row in kept:
                self._keys += row_key(row)
        return kept

    def append(self, records: Sequence[Record]) -> list[int]:
        """Write records, so that they survive a kill of this process; their seqs."""
        with _translated(f"write {self._kind} to {self._root}"):
            first = self.rows
            while (done := self.rows - first) < len(records):
                self._append(records[done : done + _MAX_ROWS])
        return list(range(first, self.rows))

    def sync(self) -> None:
        """Have everything appended so far survive a loss of power."""
        if self._shard is not None:
            with _translated(f"sync {self._kind} in {self._root}"):
                self._shard.sync()

    def seal(self) -> None:
        """Seal the open shard, if it holds anything."""
        if self._shard is None or not self._shard.rows:
            return
        with _translated(f"seal a shard of {self._kind} in {self._root}"):
            sealed = self._shard.seal(self._root)
            self._shard = None
            self._manifest.add_shard(sealed)
        self._number += 1
        if self._on_sealed is not None:
            self._on_sealed(sealed, bytes(self._keys))
        self._keys.clear()

    def close(self) -> None:
        """Sync, and leave the open shard for a later run."""
        shard, self._shard = self._shard, None
        if shard is not None:
            with _translated(f"sync {self._kind} in {self._root}"):
                shard.close()

    def _append(self, records: Sequence[Record]) -> None:
        """Write the first of `records`: as many as fill the shard, so that shards end at the same rows
        however rows came together.
        """
        if self._shard is None:
            self._shard = OpenShard(self._path(self._number), self._kind, self.rows)
        room = self._sink.shard_bytes - self._shard.bytes
        lines: list[bytes] = []
        while room > 0 and len(lines) < len(records):
            lines.append(encode_row(self.rows + len(lines), records[len(lines)]))
            room -= len(lines[-1])
        # Nothing counts before it is written: after an error the log is as it was.
        self._shard.append(b"".join(lines))
        records = records[: len(lines)]
        self.rows += len(records)
        for record in records:
            self._shard.count(_figures(record))
            if self._on_sealed is not None and not isinstance(record, Sample):
                self._keys += record.key
        if self._shard.bytes >= self._sink.shard_bytes:
            self.seal()

    def _refuse_unlisted(self, beyond: Path) -> None:
        """Only the shard that comes next may be missing from the manifest, or the manifest has lost lines."""
        name = beyond.name + OPEN_SUFFIX
        unlisted = [path for path in beyond.parent.glob("part-*") if path.name > name]
        if unlisted:
            raise SinkError(
                f"{min(unlisted)} is not in manifest.jsonl, which lists {self._number} shards of "
                f"{self._kind}: restore manifest.jsonl from a copy"
            )

    def _path(self, number: int) -> Path:
        suffix = SUFFIXES[self._sink.compression]
        return self._root / self._kind / f"part-{number:06d}{suffix}"


def encode_row(seq: int, record: Record) -> bytes:
    """The line of a record in the log."""
    body = orjson.dumps(record, default=bytes.hex, option=orjson.OPT_APPEND_NEWLINE)
    return b'{"seq":%d,%s' % (seq, body[1:])


def _figures(record: Record) -> dict[str, Any]:
    if not isinstance(record, Context):
        return {}
    return {
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "model": record.model,
    }


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn an OSError into a SinkError that says what was being done."""
    try:
        yield
    except OSError as error:
        raise SinkError(
            f"cannot {what}: {error.strerror}; what is on disk stays valid: make room and run again to go on"
        ) from error
