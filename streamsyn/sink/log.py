"""The log of one kind of record: a row of sealed shards and one that is open.

The whole log of a run directory: contexts, rejects, samples, and what is known to be finished.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
import structlog

from streamsyn.config.sections import SinkSection
from streamsyn.errors import SinkError
from streamsyn.io.durable import sync_folder, write_whole
from streamsyn.records import Context, Outcome, Reject, Sample
from streamsyn.sink import shards
from streamsyn.sink.completed_keys import Claims, CompletedKeys, row_key
from streamsyn.sink.journal import Journal
from streamsyn.sink.manifest import Manifest, SealedShard
from streamsyn.sink.shards import OPEN_SUFFIX, SUFFIXES, OpenShard

log = structlog.get_logger()

Record = Context | Reject | Sample


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


_STATE = "assembly.json"


class RunLog:
    """Opens the log of a run, taking up what an earlier one left. Every method may block.

    Reads the manifest, the open shards, and those sealed shards that a kill kept from being
    indexed (one, as a rule): what it costs does not grow with the number of outcomes.
    """

    def __init__(self, root: Path, sink: SinkSection) -> None:
        self.root = root
        manifest = root / "manifest.jsonl"
        if not manifest.exists():
            manifest.touch()
            sync_folder(root)
        self.manifest = Manifest(manifest)
        self.manifest.cut_torn_line()
        self._finished = CompletedKeys(root / "index" / "finished.sqlite")
        indexed = self._finished.add_shard
        self.contexts = ShardLog(root, "contexts", self.manifest, sink, indexed)
        self.rejects = ShardLog(root, "rejects", self.manifest, sink, indexed)
        self.samples = ShardLog(root, "samples", self.manifest, sink)
        self.samples.recover()
        tail = [*self.contexts.recover(), *self.rejects.recover()]
        self._finished.catch_up(self.manifest, root, [row_key(row) for row in tail])
        self.journal = Journal(root / "journal.sqlite")
        self._settled: list[bytes] = []
        """Drafts with steps in the journal whose outcome is written and not yet on disk."""

    @property
    def outcomes(self) -> int:
        """Contexts and rejects in the log."""
        return self.contexts.rows + self.rejects.rows

    def claims(self) -> Claims:
        """The set that tells the producer what need not be done again."""
        claims = Claims(self._finished.path, self.root / "index" / "read.sqlite")
        # Killed between the sync and the drop: their outcomes are in the log.
        self.journal.drop(claims.finished(self.journal.keys()))
        return claims

    def append(self, outcomes: Sequence[Outcome]) -> list[tuple[int, Outcome]]:
        """Write outcomes, so that they survive a kill of this process; each with its seq."""
        contexts = [outcome for outcome in outcomes if isinstance(outcome, Context)]
        rejects = [outcome for outcome in outcomes if isinstance(outcome, Reject)]
        written: list[tuple[int, Outcome]] = []
        if contexts:
            written += zip(self.contexts.append(contexts), contexts, strict=True)
        if rejects:
            written += zip(self.rejects.append(rejects), rejects, strict=True)
        self._settled += [outcome.key for outcome in outcomes if self.journal.holds(outcome.key)]
        return written

    def sync(self) -> None:
        """Have all outcomes written so far survive a loss of power."""
        self.contexts.sync()
        self.rejects.sync()
        settled, self._settled = self._settled, []
        self.journal.drop(settled)

    def read_contexts(self, first_seq: int, end_seq: int) -> Iterator[dict[str, Any]]:
        """Rows of contexts from `first_seq` up to, not with, `end_seq`."""
        return _read_rows(self.root, self.manifest, "contexts", first_seq, end_seq)

    def read_samples(self) -> Iterator[dict[str, Any]]:
        """Rows of the samples that are there by now."""
        return _read_rows(self.root, self.manifest, "samples", 0, self.samples.rows)

    def load_state(self) -> dict[str, Any] | None:
        """Where assembly stood when it was last saved; None when that is lost."""
        try:
            state: dict[str, Any] = orjson.loads((self.root / _STATE).read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return None
        return state

    def save_state(self, state: dict[str, Any]) -> None:
        """Keep where assembly stands. The samples made so far are on disk before it says so."""
        self.samples.sync()
        write_whole(self.root / _STATE, orjson.dumps(state))

    def seal_outcomes(self) -> None:
        """Seal what is open, at the end of the stream, and note where it ended."""
        self.contexts.seal()
        self.rejects.seal()
        if not self.manifest.flushes or self.manifest.flushes[-1] != self.contexts.rows:
            self.manifest.add_flush(self.contexts.rows)

    def finish(self) -> None:
        """Note that everything is done."""
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
        """Sync and leave open shards for a later run. Closes all, even when one cannot be synced.

        Args:
            quietly: Log what goes wrong in place of raising it: another error is on its way already.

        Raises:
            SinkError: A shard cannot be synced.
        """
        failures = []
        for shard_log in (self.contexts, self.rejects, self.samples):
            try:
                shard_log.close()
            except SinkError as error:
                failures.append(error)
        self._finished.close()
        self.journal.close()
        if failures and not quietly:
            raise failures[0]
        for failure in failures:
            log.warning("log.close_failed", why=str(failure))


def _read_rows(
    root: Path, manifest: Manifest, kind: str, first_seq: int, end_seq: int
) -> Iterator[dict[str, Any]]:
    """Rows from `first_seq` up to, not with, `end_seq`, sealed and open ones.

    Raises:
        SinkError: A shard is missing or damaged.
    """
    seq, tries = first_seq, 0
    while seq < end_seq and tries < 3:
        before = seq
        for path in shard_paths(root, manifest, kind, seq):
            with suppress(FileNotFoundError):  # another thread has just sealed it: look again
                for row in shards.rows(path):
                    if row.get("seq") == seq < end_seq:
                        yield row
                        seq += 1
        tries = 0 if seq > before else tries + 1
    if seq < end_seq:
        raise SinkError(f"row {seq} of {root / kind} cannot be read; `streamsyn verify` says why")


def shard_paths(root: Path, manifest: Manifest, kind: str, first_seq: int = 0) -> Iterator[Path]:
    """The shards of a kind that hold rows from `first_seq` on, in order: the open one is the last."""
    listed = manifest.of_kind(kind)
    for shard in listed:
        if shard.last_seq >= first_seq:
            yield root / shard.path
    # The rest: the open shard, and before it what has been sealed since, or by one who was killed.
    known = {root / shard.path for shard in listed}
    yield from sorted(path for path in (root / kind).glob("part-*") if path not in known)
