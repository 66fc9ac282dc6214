"""The whole log of a run directory: contexts, rejects, samples, and what is known to be finished."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import structlog

from streamsyn.errors import SinkError
from streamsyn.records import Context, Outcome, Reject
from streamsyn.sections import SinkSection
from streamsyn.sink import frames
from streamsyn.sink.finished import Claims, FinishedKeys
from streamsyn.sink.journal import Journal
from streamsyn.sink.log import ShardLog, row_key
from streamsyn.sink.manifest import Manifest
from streamsyn.sink.rundir import write_whole
from streamsyn.sink.shard import sync_folder

log = structlog.get_logger()

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
        self._finished = FinishedKeys(root / "index" / "finished.sqlite")
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
                for row in frames.rows(path):
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
