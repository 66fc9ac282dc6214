"""The log of a run: contexts, rejects and samples, each a series of sealed shards and one open shard.

`RunLog` is the whole log of a run directory, `ShardLog` the part of one kind of row. An append goes to the
open shard; when that reaches `sink.shard_bytes` it is sealed, listed in the manifest and added to the index
of completed keys, in this order.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import structlog

from streamsyn.config.sections import SinkSection
from streamsyn.errors import SinkError
from streamsyn.io.durable import disk_errors, sync_folder, write_whole
from streamsyn.records import Context, Outcome, Reject, Sample
from streamsyn.sink import shards
from streamsyn.sink.completed_keys import Claims, CompletedKeys, row_key
from streamsyn.sink.journal import Journal
from streamsyn.sink.manifest import Manifest, SealedShard
from streamsyn.sink.shards import OPEN_SUFFIX, SUFFIXES, OpenShard

log = structlog.get_logger()

Record = Context | Reject | Sample

_STATE = "assembly.json"
_MAX_ROWS = 64
"""Rows in one append: bounds the buffer for samples of many MB."""


class RunLog:
    """The log of a run directory, opened to append. Every method may block on the disk.

    Opening takes up what an earlier run left: it reads the manifest, the open shards, and those sealed shards
    that a kill kept from being indexed (usually one), so its cost does not grow with the number of outcomes.

    Args:
        root: The run directory, which this process has locked.
        sink: Size of a shard, and compression.

    Raises (all methods):
        SinkError: The disk failed, or a file of the log is damaged.
    """

    def __init__(self, root: Path, sink: SinkSection) -> None:
        self.root = root
        manifest = root / "manifest.jsonl"
        with disk_errors(f"write {manifest}"):
            if not manifest.exists():
                manifest.touch()
                sync_folder(root)
        self.manifest = Manifest(manifest)
        self.manifest.cut_torn_line()
        self._completed = CompletedKeys(root / "index" / "finished.sqlite")
        index = self._completed.add_shard
        self.contexts = ShardLog(root, "contexts", self.manifest, sink, index)
        self.rejects = ShardLog(root, "rejects", self.manifest, sink, index)
        self.samples = ShardLog(root, "samples", self.manifest, sink)
        self.samples.recover()
        tail = [*self.contexts.recover(), *self.rejects.recover()]
        self._completed.catch_up(self.manifest, root, [row_key(row) for row in tail])
        self.journal = Journal(root / "journal.sqlite")
        self._unsynced: list[bytes] = []
        """Keys of drafts with steps in the journal whose outcome is written, but not yet synced."""

    @property
    def outcomes(self) -> int:
        """Number of contexts and rejects in the log."""
        return self.contexts.rows + self.rejects.rows

    def claims(self) -> Claims:
        """The set by which the producer knows what is already completed, or read earlier in this run."""
        claims = Claims(self._completed.path, self.root / "index" / "read.sqlite")
        # An earlier run may have been killed between syncing these outcomes and dropping their steps.
        self.journal.drop(claims.finished(self.journal.keys()))
        return claims

    def append(self, outcomes: Sequence[Outcome]) -> list[tuple[int, Outcome]]:
        """Write outcomes so that they survive a kill of this process; returns each with its seq."""
        contexts = [outcome for outcome in outcomes if isinstance(outcome, Context)]
        rejects = [outcome for outcome in outcomes if isinstance(outcome, Reject)]
        written: list[tuple[int, Outcome]] = []
        if contexts:
            written += zip(self.contexts.append(contexts), contexts, strict=True)
        if rejects:
            written += zip(self.rejects.append(rejects), rejects, strict=True)
        self._unsynced += [outcome.key for outcome in outcomes if self.journal.holds(outcome.key)]
        return written

    def sync(self) -> None:
        """Sync the outcomes written so far, so that they survive a loss of power."""
        self.contexts.sync()
        self.rejects.sync()
        synced, self._unsynced = self._unsynced, []
        self.journal.drop(synced)

    def read_contexts(self, first_seq: int, end_seq: int) -> Iterator[dict[str, Any]]:
        """Rows of contexts from `first_seq` up to, but not including, `end_seq`."""
        return _read_rows(self.root, self.manifest, "contexts", first_seq, end_seq)

    def read_sample_lines(self) -> Iterator[bytes]:
        """The samples in the log, each as its line."""
        return map(shards.line, _read_rows(self.root, self.manifest, "samples", 0, self.samples.rows))

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
            self.manifest.add_final(totals)
        self.journal.close(remove_empty=True)

    def close(self, *, quietly: bool = False) -> None:
        """Sync and leave the open shards for a later run. Closes everything, even when a sync fails.

        Args:
            quietly: Log failures instead of raising them: a different error is already being raised.

        Raises:
            SinkError: A shard cannot be synced.
        """
        failures = []
        for part in (self.contexts, self.rejects, self.samples, self._completed):
            try:
                part.close()
            except SinkError as error:
                failures.append(error)
        self.journal.close()
        if failures and not quietly:
            raise failures[0]
        for failure in failures:
            log.warning("log.close_failed", why=str(failure))


class ShardLog:
    """The rows of one kind: numbered by `seq`, appended to the open shard, which is sealed when it is full.

    Not thread-safe. Every method may block on the disk and may raise SinkError.

    Args:
        root: The run directory.
        kind: One of KINDS; names the folder.
        manifest: Gets an entry for each sealed shard.
        sink: Size of a shard, and compression.
        on_sealed: Called with each sealed shard and the keys of its rows, one after the other.
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
        """Keys of the rows in the open shard."""
        self._shard: OpenShard | None = None
        sealed = manifest.of_kind(kind)
        self._number = len(sealed)
        self.rows = sealed[-1].last_seq + 1 if sealed else 0
        """Rows in the log, sealed or not; also the seq of the next row."""

    def recover(self) -> list[dict[str, Any]]:
        """Take up the open shard of an earlier run; returns its rows without their long texts."""
        with disk_errors(f"take up {self._kind} in {self._root}"):
            path = self._path(self._number)
            open_path = path.with_name(path.name + OPEN_SUFFIX)
            self._refuse_unlisted(beyond=path)
            if path.exists():  # the earlier run was killed between the rename and the manifest's line
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

    def encode(self, records: Sequence[Record]) -> Iterator[bytes]:
        """The lines that `records` get in the log if they are appended next."""
        return (encode_row(seq, record) for seq, record in enumerate(records, self.rows))

    def append(self, records: Sequence[Record]) -> list[int]:
        """Write records so that they survive a kill of this process; returns their seqs."""
        with disk_errors(f"write {self._kind} to {self._root}"):
            first = self.rows
            while (done := self.rows - first) < len(records):
                self._append_some(records[done : done + _MAX_ROWS])
        return list(range(first, self.rows))

    def sync(self) -> None:
        """Sync the rows appended so far, so that they survive a loss of power."""
        if self._shard is not None:
            with disk_errors(f"sync {self._kind} in {self._root}"):
                self._shard.sync()

    def seal(self) -> None:
        """Seal the open shard, if it has rows."""
        if self._shard is None or not self._shard.rows:
            return
        with disk_errors(f"seal a shard of {self._kind} in {self._root}"):
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
            with disk_errors(f"sync {self._kind} in {self._root}"):
                shard.close()

    def _append_some(self, records: Sequence[Record]) -> None:
        """Append as many of `records` as fill the shard, at least one.

        So shards end at the same rows, however the rows were batched.
        """
        if self._shard is None:
            self._shard = OpenShard(self._path(self._number), self._kind, self.rows)
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
            self.seal()

    def _refuse_unlisted(self, beyond: Path) -> None:
        """Only the newest shard may be missing from the manifest; more means that it has lost lines."""
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


def shard_paths(root: Path, manifest: Manifest, kind: str, first_seq: int = 0) -> Iterator[Path]:
    """The shards of a kind that hold rows from `first_seq` on, in order; the open one is the last."""
    listed = manifest.of_kind(kind)
    for shard in listed:
        if shard.last_seq >= first_seq:
            yield root / shard.path
    # The rest: shards sealed since, one sealed by a run that was killed before it was listed, the open one.
    known = {root / shard.path for shard in listed}
    yield from sorted(path for path in (root / kind).glob("part-*") if path not in known)


def _read_rows(
    root: Path, manifest: Manifest, kind: str, first_seq: int, end_seq: int
) -> Iterator[dict[str, Any]]:
    """Rows from `first_seq` up to, but not including, `end_seq`, from sealed and open shards.

    Raises:
        SinkError: A shard is missing or damaged.
    """
    seq, tries = first_seq, 0
    while seq < end_seq and tries < 3:
        before = seq
        with disk_errors(f"read {root / kind}"):
            for path in shard_paths(root, manifest, kind, seq):
                with suppress(FileNotFoundError):  # a different thread has just sealed it: look again
                    for row in shards.rows(path):
                        if row.get("seq") == seq < end_seq:
                            yield row
                            seq += 1
        tries = 0 if seq > before else tries + 1
    if seq < end_seq:
        raise SinkError(f"row {seq} of {root / kind} cannot be read: run `streamsyn verify {root}`")


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
