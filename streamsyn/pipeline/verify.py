"""`streamsyn verify`: checks every guarantee of a run directory by reading all of it, and repairs it.

`verify` finds problems and changes nothing. `Verification` is one reading of the directory: first contexts
and rejects, then samples, which `Reassembly` makes again from the contexts to compare them byte for byte.
`repair` cuts torn tails, lists unlisted shards, makes derived files again, and drops samples that are wrong.
"""

import hashlib
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import orjson
import structlog

from streamsyn.assembly.assembler import Arrangement, Assembler
from streamsyn.assembly.resources import AssemblyResources, ResourceMissing, with_templates
from streamsyn.assembly.window import Passage
from streamsyn.config.loading import Config
from streamsyn.errors import ConfigError, SinkError
from streamsyn.io.derived import open_scratch
from streamsyn.io.durable import write_whole
from streamsyn.io.process_files import temporary_files_near
from streamsyn.io.spool import never_synced
from streamsyn.sink import shards
from streamsyn.sink.completed_keys import row_key
from streamsyn.sink.epoch import Epoch
from streamsyn.sink.log import RunLog, encode_row
from streamsyn.sink.manifest import Manifest, Retry, SealedShard
from streamsyn.sink.rundir import RunDirectory, read_run_json, saved_config
from streamsyn.sink.shards import KINDS
from streamsyn.sink.snapshot import Part, SeqSet, Snapshot, superseded_by

log = structlog.get_logger()

Row = dict[str, Any]
Problems = Iterator[str]
Reassemble: TypeAlias = Callable[[Iterator[Row], list[int]], Iterator[bytes]]

_SPOOLED = frozenset({"seed", "bad", "answer", "closed"})
"""The kinds of lines in a spool."""
_DIFFERS = "differs from what the log assembles to"
_RESOURCES = {
    "assembly.prompts": "packaged templates",
    "assembly.tokenizer": "the tokenizer",
    "assembly.corpus": "the corpus",
}


def verify(root: Path) -> "tuple[list[str], Verification]":
    """Check a run directory; returns the problems found, and the reading with its notes and counts.

    Raises:
        ConfigError: It is not a run directory.
    """
    config, shaping = _saved(root)
    temporary_files_near(root)
    verification = Verification(root)
    problems: list[str] = []
    reassembly = None
    if config.assembly.write:
        try:
            reassembly = Reassembly(config, shaping)
        except ResourceMissing as error:
            verification.notes.append(f"samples are not compared with the log: {error}")
        except ConfigError as error:
            problems.append(f"samples cannot be compared with the log: {error}")
    if reassembly is not None and reassembly.changed:
        changed = ", ".join(reassembly.changed)
        verification.notes.append(f"samples are not compared with the log: changed since: {changed}")
        reassembly = None
    return [*problems, *verification.problems(reassembly)], verification


def repair(root: Path) -> None:
    """Cut torn tails, list sealed shards that are missing from the manifest, and make the index again.

    When contexts and rejects are sound, samples are dropped from the first wrong shard on: the next run
    makes them again.

    Raises:
        DirectoryInUse: A run is writing to it.
        ConfigError: It is not a run directory.
        SinkError: It cannot be read or written.
    """
    config, _ = _saved(root)
    directory = RunDirectory(root)
    try:
        _, found = verify(root)
        _drop_derived(root, directory.epoch)
        if found.log_is_sound and found.bad_samples is not None:
            _drop_samples(root, found.manifest, found.bad_samples)
            log.warning(
                "verify.samples_dropped", first=found.bad_samples, then="run again to make them again"
            )
        RunLog(root, config.sink, epoch=directory.epoch).close()
    finally:
        directory.close()


class Verification:
    """One reading of a run directory.

    Attributes:
        counts: Rows read, by kind.
        notes: What is not wrong, but normal after a run was interrupted.
        log_is_sound: Whether contexts and rejects have no problem; everything else can be made from them.
        bad_samples: The path of the first shard of samples with a problem.

    Raises:
        ConfigError: The manifest has an invalid line.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.counts = dict.fromkeys(KINDS, 0)
        self._next_seq = dict.fromkeys(KINDS, 0)
        self.notes: list[str] = []
        self.log_is_sound = True
        self.bad_samples: str | None = None
        try:
            self._snapshot = Snapshot(root)
        except SinkError as error:
            raise ConfigError(str(error)) from error
        self.manifest = self._snapshot.manifest

    def problems(self, reassemble: Reassemble | None) -> Problems:
        """Every problem, one line each.

        Args:
            reassemble: Makes the lines of samples again from the rows of contexts and the numbers of contexts
                after which streams ended; None does not compare samples with the log.
        """
        if torn := self._snapshot.torn_bytes:
            self.notes.append(f"manifest.jsonl: {torn} bytes of an unfinished last line")
        for problem in self._check_log():
            self.log_is_sound = False
            yield problem
        # Samples cannot be made from a log that is not sound.
        yield from self._check_all_samples(reassemble if self.log_is_sound else None)
        for name in ("stdin.jsonl", "seeds.jsonl"):
            yield from self._check_spool(name)
        final, sealed = self.manifest.final, self._sealed
        if final and (differing := [kind for kind in KINDS if final.get(kind) != sealed[kind]]):
            yield f"manifest.jsonl: its final line does not match the rows of {', '.join(differing)}"
        elif not self._is_finished:
            self.notes.append("manifest.jsonl: no final line after all rows: the run is not finished")

    @property
    def _sealed(self) -> dict[str, int]:
        return {kind: sum(shard.rows for shard in self.manifest.of_kind(kind)) for kind in KINDS}

    @property
    def _is_finished(self) -> bool:
        """Whether the final line covers all rows: a run may have resumed with more seeds since."""
        return self.manifest.final is not None and self.counts == self._sealed

    def _check_log(self) -> Problems:
        for kind in ("contexts", "rejects"):
            for part in self._snapshot.parts[kind]:
                yield from self._check_part(part)
        with (
            tempfile.TemporaryDirectory() as folder,
            closing(OutcomeChains(Path(folder) / "keys.sqlite", self.manifest.retries)) as chains,
        ):
            for kind in ("rejects", "contexts"):  # a context may supersede a reject, never the reverse
                yield from self._check_rows(kind, chains)

    def _check_part(self, part: Part) -> Problems:
        path = self._root / part.name
        if path.is_dir():
            yield f"{part.name}: is a directory; a shard belongs here"
        elif part.sealed is not None:
            try:
                yield from _check_sealed(self._root, part.sealed)
            except OSError as error:
                yield f"{part.name}: cannot be read: {error.strerror}"
        elif part.is_open:
            if torn := part.bytes - max((end for end, _ in part.scan()), default=0):
                self.notes.append(f"{part.name}: {torn} bytes of an unfinished last row")
        else:
            self.notes.append(f"{part.name}: sealed, but not listed in manifest.jsonl")

    def _check_rows(self, kind: str, chains: "OutcomeChains") -> Problems:
        for part in self._snapshot.parts[kind]:
            for row in part.rows():
                yield from self._check_seq(kind, part, row)
                where = f"{part.name}: row {row.get('seq')}"
                try:
                    key = row_key(row)
                except (KeyError, TypeError, ValueError, AttributeError):
                    yield f"{where} does not name its seed"
                    continue
                if problem := chains.add(kind, key, row):
                    yield f"{where}: {problem}"

    def _check_all_samples(self, reassemble: Reassemble | None) -> Problems:
        contexts = (row for part in self._snapshot.parts["contexts"] for row in part.rows())
        again = reassemble(contexts, self.manifest.flushes) if reassemble is not None else None
        for part in self._snapshot.parts["samples"]:
            for problem in self._check_samples(part, again):
                if problem.endswith(_DIFFERS):
                    again = None  # all samples after it would differ as well
                self.bad_samples = self.bad_samples or part.path
                yield problem
        if again is not None and self._is_finished and next(again, None) is not None:
            yield "samples: fewer than the log assembles to"

    def _check_samples(self, part: Part, again: Iterator[bytes] | None) -> Problems:
        if part.is_removed and part.sealed is not None:
            self._skip_removed(part.sealed, again)
            return
        yield from self._check_part(part)
        logged = range(self.counts["contexts"])
        for row in part.rows():
            yield from self._check_seq("samples", part, row)
            where, seqs = f"{part.name}: sample {row.get('seq')}", row.get("context_seqs")
            if not isinstance(seqs, list) or any(seq is not None and seq not in logged for seq in seqs):
                yield f"{where} names contexts that are not in the log"
            if again is not None and next(again, None) != shards.line(row):
                yield f"{where} {_DIFFERS}"
                again = None

    def _skip_removed(self, shard: SealedShard, again: Iterator[bytes] | None) -> None:
        self.notes.append(f"{shard.path}: removed by retention; the mirror has it")
        self._next_seq["samples"] = shard.last_seq + 1
        self.counts["samples"] += shard.rows
        if again is not None:
            deque(islice(again, shard.rows), maxlen=0)

    def _check_seq(self, kind: str, part: Part, row: Row) -> Problems:
        expected, seq = self._next_seq[kind], row.get("seq")
        if seq != expected:
            yield f"{part.name}: seq is {seq}, expected {expected}"
        self._next_seq[kind] = (seq if isinstance(seq, int) else expected) + 1
        self.counts[kind] += 1

    def _check_spool(self, name: str) -> Problems:
        path = self._root / "spool" / name
        if not path.is_file():
            return
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if _is_spooled(line):
                    offset += len(line)
                    continue
                if never_synced(line, offset):
                    self.notes.append(f"spool/{name}: it ends in seeds that were never synced, nor used")
                elif file.read(1):
                    yield f"spool/{name}:{number} is damaged: seeds after it would not be read again"
                else:
                    self.notes.append(f"spool/{name}: {len(line)} bytes of an unfinished last line")
                return


class OutcomeChains:
    """The outcomes of each draft in order: one, or rejects that retries superseded and the one that holds.

    Args:
        path: A scratch file for the keys.
        retries: The retries of the manifest.
    """

    def __init__(self, path: Path, retries: Sequence[Retry]) -> None:
        table = "CREATE TABLE latest (key BLOB PRIMARY KEY, reject INTEGER) WITHOUT ROWID"
        self._db = open_scratch(path, table, busy_timeout_s=0)
        self._db.execute("BEGIN")
        self._retries = retries
        self._lines = SeqSet()
        """The rejects of lines that were not seeds: a seed that is read there later has a key of its own."""

    def add(self, kind: str, key: bytes, row: Row) -> str:
        """Add the next outcome; returns what is wrong with it, "" if nothing is.

        Args:
            kind: Rejects, all of them first, or contexts.
            key: The key of its draft.
            row: Its row.
        """
        seq, earlier = row.get("seq"), superseded_by(row)
        if kind == "rejects" and row.get("seed_id") is None and isinstance(seq, int):
            self._lines.add(seq)
        new = (key, seq if kind == "rejects" else None)
        is_first = self._db.execute("INSERT OR IGNORE INTO latest VALUES (?, ?)", new).rowcount
        if not is_first:
            (latest,) = self._db.execute("SELECT reject FROM latest WHERE key = ?", (key,)).fetchone()
            if latest is None or latest != earlier:
                return f"{row.get('id') or row.get('origin')} has more than one outcome"
            self._db.execute("UPDATE latest SET reject = ? WHERE key = ?", (new[1], key))
        if earlier is None:
            return ""
        asked = any(isinstance(seq, int) and retry.allows(kind, seq, earlier) for retry in self._retries)
        if not asked or (is_first and earlier not in self._lines):
            return f"supersedes reject {earlier}, which no retry has asked again for it"
        return ""

    def close(self) -> None:
        """Close the scratch file."""
        self._db.close()


class Reassembly:
    """Makes the lines of samples again from the contexts of a log.

    Args:
        config: The run's configuration.
        shaping: The run's fingerprint, which holds the templates as they were.

    Attributes:
        changed: Resources that have changed since the run used them; samples cannot be compared then.

    Raises:
        ConfigError: A template cannot be used.
        ResourceMissing: The tokenizer or the corpus cannot be loaded.
    """

    def __init__(self, config: Config, shaping: Mapping[str, Any]) -> None:
        self._config = config
        with tempfile.TemporaryDirectory() as folder:
            self._resources = AssemblyResources(
                with_templates(config.assembly, "assembly", shaping, Path(folder))
            )
        now = self._resources.fingerprint()
        self.changed = [_RESOURCES[key] for key, value in now.items() if shaping.get(key, value) != value]
        if "assembly.max_similarity" not in shaping:
            self.changed.append("how samples are made, in this newer version")

    def __call__(self, contexts: Iterable[dict[str, Any]], flushes: Sequence[int]) -> Iterator[bytes]:
        """The lines in order; `flushes` are the numbers of contexts after which streams ended."""
        assembler = self._resources.assembler(self._config.run.seed)
        made = (one.sample() for some in self._batches(assembler, contexts, flushes) for one in some)
        return (encode_row(seq, sample) for seq, sample in enumerate(made))

    def _batches(
        self, assembler: Assembler, contexts: Iterable[dict[str, Any]], flushes: Sequence[int]
    ) -> Iterator[list[Arrangement]]:
        for row in contexts:
            if assembler.consumed in flushes:
                yield assembler.flush()
            yield assembler.add(Passage.of_row(row))
        if assembler.consumed in flushes:
            yield assembler.flush()


def _saved(root: Path) -> tuple[Config, dict[str, Any]]:
    """The configuration and the fingerprint of a run directory."""
    config, saved = saved_config(root), read_run_json(root)
    if config is None or saved is None:
        raise ConfigError(f"{root} is not a run directory: it has no run.json")
    return config, saved["fingerprint"]


def _check_sealed(root: Path, shard: SealedShard) -> Problems:
    path = root / shard.path
    if not path.exists():
        yield f"{shard.path}: is missing; restore it from a copy"
        return
    if (size := path.stat().st_size) != shard.bytes:
        yield f"{shard.path}: {size} bytes, the manifest says {shard.bytes}; restore it from a copy"
        return
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != shard.sha256:
        yield f"{shard.path}: has changed since it was sealed (sha256); restore it from a copy"
    rows = sum(1 for _ in shards.rows(path))
    if rows != shard.rows:
        yield f"{shard.path}: {rows} rows, the manifest says {shard.rows}"


def _is_spooled(line: bytes) -> bool:
    try:
        spooled = orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    is_whole = line.endswith(b"\n") and isinstance(spooled, dict) and len(spooled) == 1
    return is_whole and _SPOOLED.issuperset(spooled)


def _drop_samples(root: Path, manifest: Manifest, first: str) -> None:
    """Remove the shards of samples from `first` on, and the manifest's final line."""
    # Files first: after a kill in between, the listed shards are found missing, and dropped again.
    for path in (root / "samples").glob("part-*"):
        if path.is_file() and str(path.relative_to(root)) >= first:
            path.unlink()
    kept = []
    for line in (root / "manifest.jsonl").read_bytes()[: manifest.good_bytes].splitlines(keepends=True):
        listed = orjson.loads(line)
        if not listed.get("final") and not (listed.get("kind") == "samples" and listed["path"] >= first):
            kept.append(line)
    write_whole(root / "manifest.jsonl", b"".join(kept))


def _drop_derived(root: Path, epoch: Epoch) -> None:
    """Remove what can be made from the log: the index but for the owners of ids, and assembly's state."""
    for path in (*epoch.database("ids.sqlite").parent.glob("*.sqlite*"), root / "assembly.json"):
        if not path.name.startswith("ids."):
            path.unlink(missing_ok=True)
