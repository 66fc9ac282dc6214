"""`streamsyn merge`: finished runs, of several sites or the partitions of one, become one run directory.

    outcomes of each run, of a draft that several have the first -> one log, in turn -> samples -> sealed

It is written beside its place and renamed when it is whole: a merge that is killed leaves nothing there, and
the next one begins anew. What `streamsyn score` has found becomes part of the rows.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Final

import structlog

from streamsyn.assembly.resources import AssemblyResources, with_templates
from streamsyn.config.fingerprint import differences, fingerprint
from streamsyn.config.loading import Config
from streamsyn.errors import ConfigError
from streamsyn.io.derived import open_scratch
from streamsyn.io.durable import disk_errors, sync_folder
from streamsyn.pipeline.delivery import AssemblyStage, SampleDelivery
from streamsyn.records import Context, Outcome, Reject
from streamsyn.scoring.sidecar import with_scores
from streamsyn.sink.completed_keys import row_key
from streamsyn.sink.log import RunLog
from streamsyn.sink.partitions import in_turn, read_partitions
from streamsyn.sink.rundir import RunDirectory, read_run_json, saved_config
from streamsyn.sink.snapshot import Snapshot, holding_rejects
from streamsyn.telemetry import Counters

log = structlog.get_logger()

_BATCH: Final = 64
_PARTITION: Final = "seeds.partition"


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """What was merged.

    Attributes:
        runs: Run directories that were read; each partition is one.
        counts: Rows written, by kind.
        left_out: Outcomes of drafts that a run named before has, too.
    """

    runs: int
    counts: dict[str, int]
    left_out: int


@dataclass(frozen=True, slots=True)
class _Source:
    """A finished run directory."""

    root: Path
    snapshot: Snapshot

    def contexts(self) -> Iterator[dict[str, Any]]:
        for part in self.snapshot.parts["contexts"]:
            yield from with_scores(self.root, part.rows())

    def rejects(self) -> Iterator[dict[str, Any]]:
        return holding_rejects(self.snapshot)


def merge(roots: Sequence[Path], to: Path) -> MergeSummary:
    """Merge finished runs into one run directory, with memory that does not depend on their size.

    Args:
        roots: Run directories, or OUTs with partitions. Of a draft that several have, the first one counts.
        to: The new run directory.

    Raises:
        ConfigError: A run is not finished or of a different configuration, or `to` exists.
        SinkError: A log is damaged, or the new one cannot be written.
    """
    if not to.name or to.name == "..":
        raise ConfigError(f"--to {to} is a directory in use; choose a new one, and name it")
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise ConfigError(f"--to {to} exists; choose a new directory")
    sources, ends = _sources(roots)
    saved, config = _common(sources)
    beside = to.with_name(f".{to.name}.merging")
    _clear(beside)
    directory = RunDirectory(beside)
    try:
        with tempfile.TemporaryDirectory() as folder:
            templates = with_templates(config.assembly, "assembly", saved["fingerprint"], Path(folder))
            resources = AssemblyResources(templates)
            directory.save(*_run_json(saved, resources))
            summary = _write(sources, ends, beside, config, resources)
        with disk_errors(f"rename {beside} to {to}"):
            if to.exists():
                to.rmdir()
            beside.rename(to)
            sync_folder(to.parent)
    finally:
        directory.close()
    return summary


def _sources(roots: Sequence[Path]) -> tuple[list[_Source], Sequence[Sequence[int]]]:
    """The run directories, and the order of their rows: that in which OUT with partitions is read."""
    directories, ends = [], []
    for root in roots:
        partitions = read_partitions(root)
        if partitions is not None and not partitions.has_ended:
            raise ConfigError(f"{root} is not finished; run `streamsyn run --out {root}` first")
        directories += [root] if partitions is None else partitions.directories
        ends = [] if partitions is None or len(roots) > 1 else partitions.ends("contexts")
    if len({one.resolve() for one in directories}) < len(directories):
        raise ConfigError("a run directory is named twice")
    return [_source(root) for root in directories], ends


def _source(root: Path) -> _Source:
    if read_run_json(root) is None:
        raise ConfigError(f"{root} is not a run directory: it has no run.json")
    snapshot = Snapshot(root)
    is_sealed = all(part.sealed is not None or not part.bytes for part in snapshot.parts["contexts"])
    if snapshot.manifest.final is None or not is_sealed:
        raise ConfigError(f"{root} is not finished; run `streamsyn run --out {root}` first")
    return _Source(root, snapshot)


def _common(sources: Sequence[_Source]) -> tuple[dict[str, Any], Config]:
    """The run.json of the first run and its configuration; the others have the same fingerprint."""
    first, config = read_run_json(sources[0].root), saved_config(sources[0].root)
    assert first is not None
    assert config is not None
    defaults = fingerprint(Config())
    for source in sources[1:]:
        other = read_run_json(source.root)
        assert other is not None
        before, now = (
            {key: value for key, value in one["fingerprint"].items() if key != _PARTITION}
            for one in (first, other)
        )
        if different := differences(before, now, defaults):
            raise ConfigError(
                f"{source.root} has a different configuration than {sources[0].root} ({different}); "
                "merge only runs of one configuration"
            )
    return first, config


def _run_json(saved: dict[str, Any], resources: AssemblyResources) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of the merged run and its fingerprint: no partition, and no mirror of one run."""
    config = {
        **saved["config"],
        "seeds": {**saved["config"]["seeds"], "partition": None},
        "sink": {**saved["config"]["sink"], "mirror": None},
    }
    return config, {**saved["fingerprint"], **resources.fingerprint(), _PARTITION: None}


def _clear(beside: Path) -> None:
    """Remove what a merge that was killed has left; one that goes on is refused."""
    if beside.exists():
        RunDirectory(beside).close()
        log.info("merge.begins_anew", removed=str(beside))
        with disk_errors(f"remove {beside}"):
            shutil.rmtree(beside)


def _write(
    sources: Sequence[_Source],
    ends: Sequence[Sequence[int]],
    beside: Path,
    config: Config,
    resources: AssemblyResources,
) -> MergeSummary:
    owners = beside / "index" / "owners.sqlite"
    table = "CREATE TABLE owners (key BLOB PRIMARY KEY, source INTEGER) WITHOUT ROWID"
    with (
        closing(open_scratch(owners, table, busy_timeout_s=0)) as db,
        closing(RunLog(beside, config.sink)) as to,
    ):
        left_out = _find_owners(sources, db)
        contexts = in_turn([source.contexts() for source in sources], ends)
        rejects = in_turn([source.rejects() for source in sources])
        owned = _owned(chain(contexts, rejects), db)
        while batch := list(islice(owned, _BATCH)):
            to.append([*map(_outcome, batch)])
            if to.has_full_shards:
                to.sync()
        _assemble(to, config, resources)
        counts = to.counts()
    owners.unlink()
    return MergeSummary(len(sources), counts, left_out)


def _find_owners(sources: Sequence[_Source], db: Connection) -> int:
    """Note for each draft the first run that has it; returns how many outcomes others have of these."""
    left_out = 0
    db.execute("BEGIN")
    for at, source in enumerate(sources):
        for part in source.snapshot.parts["contexts"]:
            left_out += sum(_is_repeated(db, row_key(row), at) for row in part.rows())
        left_out += sum(_is_repeated(db, row_key(row), at) for row in source.rejects())
    db.execute("COMMIT")
    return left_out


def _is_repeated(db: Connection, key: bytes, source: int) -> bool:
    return not db.execute("INSERT OR IGNORE INTO owners VALUES (?, ?)", (key, source)).rowcount


def _owned(rows: Iterable[tuple[int, dict[str, Any]]], db: Connection) -> Iterator[dict[str, Any]]:
    """The rows of the runs that they are taken from."""
    for at, row in rows:
        (owner,) = db.execute("SELECT source FROM owners WHERE key = ?", (row_key(row),)).fetchone()
        if owner == at:
            yield row


def _outcome(row: dict[str, Any]) -> Outcome:
    """A row as the record that it was; it supersedes nothing here: only rejects that hold are taken."""
    fields = {**row, "supersedes": None}
    seq = fields.pop("seq")
    try:
        if "reason" in fields:
            return Reject(**{**fields, "key": bytes.fromhex(fields["key"])})
        return Context(**fields)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"row {seq} was written by a different version of streamsyn: {error}") from error


def _assemble(to: RunLog, config: Config, resources: AssemblyResources) -> None:
    """Make the samples, and seal all."""
    if not config.assembly.write:
        to.seal_outcomes()
        to.finish()
        return
    stage = AssemblyStage(
        partial(resources.assembler, config.run.seed),
        to,
        SampleDelivery(to, None, Counters()),
        logged=to.contexts.rows,
        delivered=0,
        flushes=(),
    )
    stage.catch_up()
    to.seal_outcomes()
    stage.finish()
    to.finish()
