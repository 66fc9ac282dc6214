"""`streamsyn verify` for OUT as a whole: each of its run directories, and what holds across partitions."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from streamsyn.errors import SinkError
from streamsyn.io.derived import open_scratch
from streamsyn.pipeline.verify import verify
from streamsyn.records import draft_key
from streamsyn.sink.completed_keys import row_key
from streamsyn.sink.manifest import Manifest
from streamsyn.sink.partitions import FILE, Partitions, read_partitions
from streamsyn.sink.shards import KINDS
from streamsyn.sink.snapshot import Snapshot

_MAX_NAMED = 20
"""Seeds in two partitions that are named; they come by the thousand, if at all."""


@dataclass(slots=True)
class JoinedVerification:
    """What was found.

    Attributes:
        problems: One line each.
        notes: What is not wrong, but normal after a run was interrupted.
        counts: Rows read, by kind.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def verify_joined(root: Path) -> JoinedVerification:
    """Check a run directory, or all partitions of OUT.

    Raises:
        ConfigError: It is not a run directory.
    """
    partitions = read_partitions(root)
    result = JoinedVerification()
    for directory in [root] if partitions is None else partitions.directories:
        where = "" if partitions is None else f"{directory.name}/"
        if partitions is not None and not (directory / "run.json").exists():
            result.notes.append(f"{directory.name}: not begun")
            continue
        problems, found = verify(directory)
        result.problems += (where + line for line in problems)
        result.notes += (where + line for line in found.notes)
        result.counts.update(found.counts)
    if partitions is not None and not result.problems:  # what cannot be read cannot be compared
        result.problems += _fewer_rows(partitions)
        result.problems += _seeds_in_two(partitions)
    return result


def _fewer_rows(partitions: Partitions) -> Iterator[str]:
    """Yield the partitions that have fewer rows than partitions.json has recorded."""
    for at, directory in enumerate(partitions.directories):
        manifest = Manifest(directory / "manifest.jsonl")
        for kind in KINDS:
            recorded = max([ends[at] for ends in partitions.ends(kind)], default=0)
            recorded = max(recorded, partitions.totals(kind)[at] or 0)
            sealed = sum(shard.rows for shard in manifest.of_kind(kind))
            if sealed < recorded:
                yield f"{FILE}: {directory.name} had {recorded} {kind}, and has {sealed}"


def _seeds_in_two(partitions: Partitions) -> Iterator[str]:
    """Yield the seeds and lines that have outcomes in more than one partition."""
    with tempfile.TemporaryDirectory() as folder:
        table = "CREATE TABLE seen (key BLOB PRIMARY KEY, partition INTEGER) WITHOUT ROWID"
        with closing(open_scratch(Path(folder) / "seeds.sqlite", table, busy_timeout_s=0)) as db:
            db.execute("BEGIN")
            named = 0
            for at, name, key in _seed_keys(partitions):
                if db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, at)).rowcount:
                    continue
                (first,) = db.execute("SELECT partition FROM seen WHERE key = ?", (key,)).fetchone()
                if first != at:
                    named += 1
                    yield f"{name} has outcomes in partition-{first:03d} and in partition-{at:03d}"
                    if named == _MAX_NAMED:
                        return


def _seed_keys(partitions: Partitions) -> Iterator[tuple[int, str, bytes]]:
    """Yield the partition of each outcome, its seed's name, and a key of its seed."""
    for at, directory in enumerate(partitions.directories):
        try:
            snapshot = Snapshot(directory)
        except SinkError:
            continue  # `verify` has reported it
        for part in (*snapshot.parts["contexts"], *snapshot.parts["rejects"]):
            for row in part.rows():
                seed = row.get("seed_id")
                key = row_key(row) if seed is None else draft_key(seed, 0)
                yield at, f"seed {seed}" if seed is not None else str(row.get("origin")), key
