"""The log of a run: contexts, rejects and samples, each a series of sealed shards and one open shard.

`RunLog` is the whole log of a run directory, `ShardLog` the part of one kind of row. A write goes to the open
shard; when that reaches `sink.shard_bytes` the next one is opened. The full one is sealed, listed in the
manifest and added to the index of completed keys, in this order, which takes syncs and so is done apart.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import orjson
import structlog

from streamsyn.config.sections import SinkSection
from streamsyn.errors import SinkError, TakenOver
from streamsyn.io.durable import disk_errors, sync_folder, write_whole
from streamsyn.records import Context, Outcome, Reject, Sample
from streamsyn.sink import shards
from streamsyn.sink.completed_keys import Claims, CompletedKeys, row_key
from streamsyn.sink.epoch import Epoch
from streamsyn.sink.journal import Journal
from streamsyn.sink.manifest import Manifest, Retry, SealedShard, removed_rows
from streamsyn.sink.shards import OPEN_SUFFIX, SUFFIXES, OpenShard
from streamsyn.sink.snapshot import SeqSet, Snapshot, open_rejects, read_rows, superseded

log = structlog.get_logger()

Record = Context | Reject | Sample

_NOT_SUPERSEDING = b'{"supersedes":null,'
_STATE = "assembly.json"
_MAX_ROWS = 64
"""Rows in one append: bounds the buffer for samples of many MB."""


class RunLog:
    """The log of a run directory, opened to append. Every method may block on the disk.

    One thread may append outcomes while another one syncs: a sync does not keep answers from being written.

    Opening takes up what an earlier run left: it reads the manifest, the open shards, and those sealed shards
    that a kill kept from being indexed (usually one), so its cost does not grow with the number of outcomes.

    Args:
        root: The run directory, which this process has locked.
        sink: Size of a shard, and compression.
        epoch: That of this process; None if no other process can know the directory.
        on_rows: Called with a kind and the number of its rows that readers may see, whenever it has grown,
            in the thread that wrote or synced; must not block. It counts contexts and rejects once they are
            synced, and samples once they are written: a sample is made of synced contexts, so a loss of
            power can only have it written again with the same bytes.

    Raises (all methods):
        SinkError: The disk failed, or a file of the log is damaged.
        TakenOver: A newer process writes to the directory. What was synced before is in its log.
    """

    def __init__(
        self,
        root: Path,
        sink: SinkSection,
        on_rows: Callable[[str, int], None] = lambda _kind, _rows: None,
        epoch: Epoch | None = None,
    ) -> None:
        self.root = root
        self.epoch = epoch or Epoch(root)
        manifest = root / "manifest.jsonl"
        with disk_errors(f"write {manifest}"):
            if not manifest.exists():
                manifest.touch()
                sync_folder(root)
        self.manifest = Manifest(manifest, self.epoch)
        self.manifest.cut_torn_line()
        self._completed = CompletedKeys(self.epoch.database("finished.sqlite"))
        index = self._completed.add_shard
        self.contexts, self.rejects, self.samples = (
            ShardLog(root, kind, self.manifest, sink, on_sealed, partial(on_rows, kind), self.epoch)
            for kind, on_sealed in (("contexts", index), ("rejects", index), ("samples", None))
        )
        self.samples.recover()
        tail = [*self.contexts.recover(), *self.rejects.recover()]
        self._completed.catch_up(self.manifest, root, [row_key(row) for row in tail])
        self.journal = Journal(self.epoch.database("journal.sqlite"))
        self._unsynced: list[bytes] = []
        """Keys of drafts with steps in the journal whose outcome is written, but not yet synced."""
        self._lock = Lock()
        """Guards `_unsynced`."""
        self._superseded = SeqSet()
        """While a retry is open: the rejects that no longer hold."""
        self._find_superseded()

    @property
    def outcomes(self) -> int:
        """Number of contexts and rejects in the log."""
        return self.contexts.rows + self.rejects.rows

    @property
    def holding_rejects(self) -> int:
        """Number of rejects that no later outcome supersedes."""
        return self.rejects.rows - self.superseded

    @property
    def superseded(self) -> int:
        """Number of rejects that a later outcome supersedes."""
        return len(self._superseded) if self.manifest.open_retries else self.manifest.superseded

    def counts(self) -> dict[str, int]:
        """The numbers of contexts, of rejects that hold, and of samples in the log."""
        rejects = self.holding_rejects
        return {"contexts": self.contexts.rows, "rejects": rejects, "samples": self.samples.rows}

    def add_retry(self, reasons: Sequence[str]) -> None:
        """Have the rejects of these reasons asked again: they are open until the log is finished."""
        self.rejects.seal()  # so that a mirror has them before the outcomes that supersede them
        retry = Retry(
            reasons=list(reasons),
            contexts=self.contexts.rows,
            rejects=self.rejects.rows,
            seeds_read=self.manifest.seeds_read,
            at=time.time(),
        )
        self.manifest.add_retry(retry)
        self._find_superseded()

    def open_rejects(self) -> Iterator[dict[str, Any]]:
        """The rows of rejects that are to be asked again."""
        if self.manifest.open_retries:
            with disk_errors(f"read the rejects of {self.root}"):
                yield from open_rejects(Snapshot(self.root), self._superseded)

    def claims(self) -> Claims:
        """The set by which the producer knows what is already completed, or read earlier in this run."""
        claims = Claims(self._completed.path, self.epoch.database("read.sqlite"))
        # An earlier run may have been killed between syncing these outcomes and dropping their steps.
        finished = claims.finished(self.journal.keys())
        if finished and self.manifest.open_retries:
            finished.difference_update(map(row_key, self.open_rejects()))
        self.journal.drop(finished)
        return claims

    @property
    def has_full_shards(self) -> bool:
        """Whether the next `sync` seals shards."""
        return self.contexts.has_full or self.rejects.has_full

    def append(self, outcomes: Sequence[Outcome]) -> list[tuple[int, Outcome]]:
        """Write outcomes so that they survive a kill of this process; returns each with its seq.

        It never syncs; shards that are full are sealed by the next `sync`.
        """
        contexts = [outcome for outcome in outcomes if isinstance(outcome, Context)]
        rejects = [outcome for outcome in outcomes if isinstance(outcome, Reject)]
        written: list[tuple[int, Outcome]] = []
        if contexts:
            written += zip(self.contexts.write(contexts), contexts, strict=True)
        if rejects:
            written += zip(self.rejects.write(rejects), rejects, strict=True)
        with self._lock:
            self._unsynced += [outcome.key for outcome in outcomes if self.journal.holds(outcome.key)]
        for outcome in outcomes:
            if outcome.supersedes is not None:
                self._superseded.add(outcome.supersedes)
        return written

    def sync(self) -> None:
        """Sync the outcomes written so far, so that they survive a loss of power, and seal full shards.

        A different thread may call `append` meanwhile; what it writes is left to the next sync.
        """
        with self._lock:
            syncing, self._unsynced = self._unsynced, []
        self.contexts.sync()
        self.rejects.sync()
        self.journal.drop(syncing)

    def read_contexts(self, first_seq: int, end_seq: int) -> Iterator[dict[str, Any]]:
        """Rows of contexts from `first_seq` up to, but not including, `end_seq`."""
        return read_rows(self.root, self.manifest, "contexts", first_seq, end_seq)

    def read_sample_lines(self) -> Iterator[bytes]:
        """The samples in the log that retention has not removed, each as its line."""
        first = removed_rows(self.root)
        return map(shards.line, read_rows(self.root, self.manifest, "samples", first, self.samples.rows))

    def load_state(self) -> dict[str, Any] | None:
        """The assembly state saved last; None when there is none, or it is damaged."""
        try:
            state: dict[str, Any] = orjson.loads((self.root / _STATE).read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return None
        return state

    def save_state(self, state: dict[str, Any]) -> None:
        """Save the assembly state, after syncing the samples that it counts."""
        self.samples.sync()
        write_whole(self.root / _STATE, orjson.dumps(state))

    def seal_outcomes(self) -> None:
        """Seal contexts and rejects at the end of the stream, and record in the manifest where it ended."""
        self.contexts.seal()
        self.rejects.seal()
        if not self.manifest.flushes or self.manifest.flushes[-1] != self.contexts.rows:
            self.manifest.add_flush(self.contexts.rows)

    def finish(self) -> None:
        """Seal the samples and write the manifest's final line: every seed has its outcome."""
        self.samples.seal()
        if self.manifest.final is None:
            totals = {
                "contexts": self.contexts.rows,
                "rejects": self.rejects.rows,
                "samples": self.samples.rows,
            }
            if self.superseded:
                totals["superseded"] = self.superseded
            self.manifest.add_final(totals)
        self.journal.close(remove_empty=True)

    def _find_superseded(self) -> None:
        if self.manifest.open_retries:
            with disk_errors(f"read {self.root}"):
                self._superseded = superseded(Snapshot(self.root))

    def close(self, *, quietly: bool = False) -> None:
        """Sync and leave the open shards for a later run. Closes everything, even when a sync fails.

        Args:
            quietly: Log failures of the disk instead of raising: a different error is already being raised.

        Raises:
            SinkError: A shard cannot be synced.
            TakenOver: As all methods.
        """
        failures: list[SinkError | TakenOver] = []
        for part in (self.contexts, self.rejects, self.samples, self._completed):
            try:
                part.close()
            except (SinkError, TakenOver) as error:
                failures.append(error)
        self.journal.close()
        self.manifest.close()
        if failures and not quietly:
            raise failures[0]
        for failure in failures:
            if isinstance(failure, SinkError):
                log.warning("log.close_failed", why=str(failure))


class ShardLog:
    """The rows of one kind: numbered by `seq`, appended to the open shard, until that is full.

    One thread may `write` while another one calls `sync`. Every method may block on the disk and may raise
    SinkError.

    Args:
        root: The run directory.
        kind: One of KINDS; names the folder.
        manifest: Gets an entry for each sealed shard.
        sink: Size of a shard, and compression.
        on_sealed: Called with each sealed shard and the keys of its rows, one after the other.
        on_rows: Called with the number of rows that readers may see, as `RunLog` describes.
        epoch: As `RunLog`.
    """

    def __init__(
        self,
        root: Path,
        kind: str,
        manifest: Manifest,
        sink: SinkSection,
        on_sealed: Callable[[SealedShard, bytes], None] | None = None,
        on_rows: Callable[[int], None] = lambda _rows: None,
        epoch: Epoch | None = None,
    ) -> None:
        self._epoch = epoch or Epoch(root)
        self._root = root
        self._kind = kind
        self._manifest = manifest
        self._sink = sink
        self._on_sealed = on_sealed
        self._on_rows = on_rows
        self._keys = bytearray()
        """Keys of the rows in the open shard."""
        self._shard: OpenShard | None = None
        self._full: deque[tuple[OpenShard, bytes]] = deque()
        """Full shards that are not sealed yet, each with the keys of its rows."""
        sealed = manifest.of_kind(kind)
        self._number = len(sealed)
        self.rows = sealed[-1].last_seq + 1 if sealed else 0
        """Rows in the log, sealed or not; also the seq of the next row."""

    def recover(self) -> list[dict[str, Any]]:
        """Take up the unsealed shards of an earlier run; returns the rows of the last one without long texts.

        It opened a shard when the one before was full, and sealed that one later. So all but the last are
        full, unless a loss of power has cost rows of one: then those behind were never synced, and are
        dropped.
        """
        kept: list[dict[str, Any]] = []
        with disk_errors(f"take up {self._kind} in {self._root}"):
            unlisted = self._unlisted()
            for at, number in enumerate(unlisted):
                found = self._take_up(number)
                if found is None:
                    self._drop(unlisted[at:])
                    break
                kept = found
            while self._full:
                shard, _ = self._full.popleft()
                self._manifest.add_shard(shard.seal(self._root))  # the index adds what the manifest lists
        if self._on_sealed is not None:
            for row in kept:
                self._keys += row_key(row)
        self._on_rows(self.rows)
        return kept

    def _take_up(self, number: int) -> list[dict[str, Any]] | None:
        """Make a shard the open one; returns its rows, or None if they do not continue those before."""
        if number != self._number + (self._shard is not None):
            return None
        path = self._path(number)
        try:
            shard = OpenShard(path, self._kind, self.rows, self._epoch, is_new=False)
        except FileNotFoundError:  # the earlier run was killed between the rename and the manifest's line
            self._epoch.check()
            path.rename(path.with_name(path.name + OPEN_SUFFIX))
            shard = OpenShard(path, self._kind, self.rows, self._epoch, is_new=False)
        kept = shard.recover()
        if self._shard is not None and not kept:
            shard.close()
            return None
        self._finish_shard()
        self._shard, self.rows = shard, shard.next_seq
        return kept

    def encode(self, records: Sequence[Record]) -> Iterator[bytes]:
        """The lines that `records` get in the log if they are appended next."""
        return (encode_row(seq, record) for seq, record in enumerate(records, self.rows))

    @property
    def has_full(self) -> bool:
        """Whether there are full shards to be sealed."""
        return bool(self._full)

    def append(self, records: Sequence[Record]) -> list[int]:
        """As `write`, then seal the shards that this has filled, and show the rows to readers.

        In this order: readers find rows in the shards that the manifest lists and in the one after them.
        """
        seqs = self.write(records)
        self._seal_full()
        self._on_rows(self.rows)
        return seqs

    def write(self, records: Sequence[Record]) -> list[int]:
        """Write records so that they survive a kill of this process, and sync nothing; returns their seqs."""
        with disk_errors(f"write {self._kind} to {self._root}"):
            first = self.rows
            while (done := self.rows - first) < len(records):
                self._append_some(records[done : done + _MAX_ROWS])
        return list(range(first, self.rows))

    def sync(self) -> None:
        """Sync the rows written so far, so that they survive a loss of power, and seal full shards."""
        # Before the full ones are sealed: a writing thread may add to them meanwhile.
        rows, shard = self.rows, self._shard
        self._seal_full()
        if shard is not None:
            with disk_errors(f"sync {self._kind} in {self._root}"):
                shard.sync()
        self._on_rows(rows)

    def seal(self) -> None:
        """Seal the open shard, if it has rows."""
        if self._shard is not None and self._shard.rows:
            self._finish_shard()
        self._seal_full()
        self._on_rows(self.rows)

    def close(self) -> None:
        """Sync, and leave the unsealed shards for a later run."""
        unsealed = [shard for shard, _ in self._full] + ([self._shard] if self._shard else [])
        self._shard = None
        self._full.clear()
        with disk_errors(f"sync {self._kind} in {self._root}"), ExitStack() as closing:
            for shard in reversed(unsealed):
                closing.callback(shard.close)

    def _seal_full(self) -> None:
        while self._full:
            shard, keys = self._full[0]
            with disk_errors(f"seal a shard of {self._kind} in {self._root}"):
                sealed = shard.seal(self._root)
                self._manifest.add_shard(sealed)
            self._full.popleft()
            if self._on_sealed is not None:
                self._on_sealed(sealed, keys)

    def _finish_shard(self) -> None:
        """Leave the open shard, if there is one, to be sealed; the next row begins a new one."""
        if self._shard is None:
            return
        self._full.append((self._shard, bytes(self._keys)))
        self._shard = None
        self._keys.clear()
        self._number += 1

    def _append_some(self, records: Sequence[Record]) -> None:
        """Append as many of `records` as fill the shard, at least one.

        So shards end at the same rows, however the rows were batched.
        """
        if self._shard is not None and self._shard.bytes >= self._sink.shard_bytes:
            self._finish_shard()  # an earlier run was killed before it opened the next one
        if self._shard is None:
            self._shard = OpenShard(self._path(self._number), self._kind, self.rows, self._epoch)
        room = self._sink.shard_bytes - self._shard.bytes
        lines: list[bytes] = []
        while room > 0 and len(lines) < len(records):
            lines.append(encode_row(self.rows + len(lines), records[len(lines)]))
            room -= len(lines[-1])
        records = records[: len(lines)]
        self._shard.append(lines, map(_counted, records))
        self.rows += len(records)
        if self._on_sealed is not None:
            for record in records:
                if not isinstance(record, Sample):
                    self._keys += record.key
        if self._shard.bytes >= self._sink.shard_bytes:
            self._finish_shard()

    def _unlisted(self) -> list[int]:
        """The numbers of the shards that the manifest does not list, in order.

        Raises:
            SinkError: More than one of them is sealed. Each is listed before the next one is sealed, so the
                manifest has lost lines.
        """
        paths = sorted((self._root / self._kind).glob("part-" + "[0-9]" * 6 + ".*"))
        unlisted = [path for path in paths if int(path.name[5:11]) >= self._number]
        for path in unlisted:
            if path.suffix != OPEN_SUFFIX and path != self._path(self._number):
                raise SinkError(
                    f"{path} is not in manifest.jsonl, which lists {self._number} shards of "
                    f"{self._kind}: restore manifest.jsonl from a copy"
                )
        return sorted({int(path.name[5:11]) for path in unlisted})

    def _drop(self, numbers: Sequence[int]) -> None:
        """Remove open shards whose rows were never synced, before new rows get their numbers."""
        for path in map(self._path, numbers):
            self._epoch.check()
            path.with_name(path.name + OPEN_SUFFIX).unlink()
        sync_folder(self._root / self._kind)

    def _path(self, number: int) -> Path:
        suffix = SUFFIXES[self._sink.compression]
        return self._root / self._kind / f"part-{number:06d}{suffix}"


def encode_row(seq: int, record: Record) -> bytes:
    """The line of a record in the log."""
    body = orjson.dumps(record, default=bytes.hex, option=orjson.OPT_APPEND_NEWLINE)
    start = len(_NOT_SUPERSEDING) if body.startswith(_NOT_SUPERSEDING) else 1
    return b'{"seq":%d,%s' % (seq, body[start:])


def _counted(record: Record) -> dict[str, Any]:
    """What the manifest adds up of a record."""
    if not isinstance(record, Context):
        return {}
    return {
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "model": record.model,
    }
