"""Checks every guarantee of a run directory, by reading all of it."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import orjson

from streamsyn.errors import ConfigError, SinkError
from streamsyn.io.durable import write_whole
from streamsyn.sink import shards
from streamsyn.sink.completed_keys import Claim, Claims, row_key
from streamsyn.sink.manifest import Manifest, SealedShard
from streamsyn.sink.rundir import read_run_json
from streamsyn.sink.shards import KINDS
from streamsyn.sink.snapshot import Part, Snapshot

Row = dict[str, Any]
Problems = Iterator[str]
Reassemble: TypeAlias = Callable[[Iterator[Row], list[int]], Iterator[bytes]]
_DIFFERS = "is not what the log assembles to"


class Verification:
    """One reading of a run directory; `problems` finds what is wrong, `counts` what is there.

    Raises:
        ConfigError: It is no run directory.
    """

    def __init__(self, root: Path) -> None:
        if read_run_json(root) is None:
            raise ConfigError(f"{root} is no run directory: it has no run.json")
        self.root = root
        self.counts = dict.fromkeys(KINDS, 0)
        self._next_seq = dict.fromkeys(KINDS, 0)
        self.notes: list[str] = []
        """What is as it should be in a run that was interrupted."""
        self.log_is_sound = True
        """Whether nothing is wrong with contexts and rejects, of which all else can be made again."""
        self.bad_samples: str | None = None
        """The first shard of samples that something is wrong with."""
        try:
            self._snapshot = Snapshot(root)
        except SinkError as error:
            raise ConfigError(str(error)) from error
        self.manifest = self._snapshot.manifest

    def problems(self, reassemble: Reassemble | None) -> Problems:
        """Everything that is wrong, a line each.

        `reassemble` makes the lines of samples again from rows of contexts and the numbers of contexts
        at which streams ended; None passes that over.
        """
        if torn := self._snapshot.torn_bytes:
            self.notes.append(f"manifest.jsonl: {torn} bytes of an unfinished line at its end")
        for problem in self._log():
            self.log_is_sound = False
            yield problem
        # Samples cannot be made of a log that is not sound.
        yield from self._samples(reassemble if self.log_is_sound else None)
        yield from self._spool()
        final, sealed = self.manifest.final, self._sealed
        if final and (differing := [kind for kind in KINDS if final.get(kind) != sealed[kind]]):
            yield f"manifest.jsonl: its final line counts other rows than there are of {', '.join(differing)}"
        elif not self._is_finished:
            self.notes.append("manifest.jsonl: no final line behind all rows: the run is not finished")

    @property
    def _sealed(self) -> dict[str, int]:
        return {kind: sum(shard.rows for shard in self.manifest.of_kind(kind)) for kind in KINDS}

    @property
    def _is_finished(self) -> bool:
        """Whether nothing came behind the manifest's final line: a run may go on with more seeds."""
        return self.manifest.final is not None and self.counts == self._sealed

    def _log(self) -> Problems:
        for kind in ("contexts", "rejects"):
            for part in self._snapshot.parts[kind]:
                yield from self._check_part(part)
        with tempfile.TemporaryDirectory() as folder:
            claims = Claims(None, Path(folder) / "keys.sqlite")
            try:
                for kind in ("contexts", "rejects"):
                    yield from self._rows(kind, claims)
            finally:
                claims.close()

    def _check_part(self, part: Part) -> Problems:
        path = self.root / part.name
        if path.is_dir():
            yield f"{part.name}: is a directory; a shard belongs here"
        elif part.sealed is not None:
            try:
                yield from _check_sealed(self.root, part.sealed)
            except OSError as error:
                yield f"{part.name}: cannot be read: {error.strerror}"
        elif part.is_open:
            if torn := part.bytes - max((end for end, _ in part.scan()), default=0):
                self.notes.append(f"{part.name}: {torn} bytes of an unfinished row at its end")
        else:
            self.notes.append(f"{part.name}: sealed, but the manifest was not told")

    def _rows(self, kind: str, claims: Claims) -> Problems:
        for part in self._snapshot.parts[kind]:
            with claims.batch():
                for row in part.rows():
                    yield from self._check_seq(kind, part, row)
                    where = f"{part.name}: row {row.get('seq')}"
                    try:
                        key = row_key(row)
                    except (KeyError, TypeError, ValueError, AttributeError):
                        yield f"{where} does not say which seed it is of"
                        continue
                    if claims.claim(key) is Claim.REPEATED:
                        yield f"{where}: {row.get('id') or row.get('origin')} has more than one outcome"

    def _samples(self, reassemble: Reassemble | None) -> Problems:
        contexts = (row for part in self._snapshot.parts["contexts"] for row in part.rows())
        again = reassemble(contexts, self.manifest.flushes) if reassemble is not None else None
        for part in self._snapshot.parts["samples"]:
            for problem in self._check_samples(part, again):
                if problem.endswith(_DIFFERS):
                    again = None  # all that follow would differ as well
                self.bad_samples = self.bad_samples or part.path
                yield problem
        if again is not None and self._is_finished and next(again, None) is not None:
            yield "samples: there are fewer than the log assembles to"

    def _check_samples(self, part: Part, again: Iterator[bytes] | None) -> Problems:
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

    def _check_seq(self, kind: str, part: Part, row: Row) -> Problems:
        expected, seq = self._next_seq[kind], row.get("seq")
        if seq != expected:
            yield f"{part.name}: seq {expected} is next, not {seq}"
        self._next_seq[kind] = (seq if isinstance(seq, int) else expected) + 1
        self.counts[kind] += 1

    def _spool(self) -> Problems:
        path = self.root / "spool" / "stdin.jsonl"
        if not path.is_file():
            return
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if _is_spooled(line):
                    continue
                if file.read(1):
                    yield f"spool/stdin.jsonl:{number} is damaged; seeds behind it would not be read again"
                else:
                    self.notes.append(
                        f"spool/stdin.jsonl: {len(line)} bytes of an unfinished line at its end"
                    )
                return


def _check_sealed(root: Path, shard: SealedShard) -> Problems:
    path = root / shard.path
    if not path.exists():
        yield f"{shard.path}: is missing; restore it from a copy"
        return
    if (size := path.stat().st_size) != shard.bytes:
        yield f"{shard.path}: {size} bytes, the manifest says {shard.bytes}; restore it from a copy"
        return
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(shards.CHUNK_BYTES):
            hashed.update(chunk)
    if hashed.hexdigest() != shard.sha256:
        yield f"{shard.path}: has changed since it was sealed (sha256); restore it from a copy"
    rows = sum(1 for _ in shards.rows(path))
    if rows != shard.rows:
        yield f"{shard.path}: {rows} rows, the manifest says {shard.rows}"


def _is_spooled(line: bytes) -> bool:
    try:
        spooled = orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return line.endswith(b"\n") and isinstance(spooled, dict) and list(spooled) in (["seed"], ["bad"])


def drop_samples(root: Path, manifest: Manifest, first: str) -> None:
    """Remove the shards of samples from `first` on, and the manifest's final line: a run makes them again."""
    # Files go first: killed in between, what is listed and missing is found, and dropped again.
    for path in (root / "samples").glob("part-*"):
        if path.is_file() and str(path.relative_to(root)) >= first:
            path.unlink()
    kept = []
    for line in (root / "manifest.jsonl").read_bytes()[: manifest.good_bytes].splitlines(keepends=True):
        listed = orjson.loads(line)
        if not listed.get("final") and not (listed.get("kind") == "samples" and listed["path"] >= first):
            kept.append(line)
    write_whole(root / "manifest.jsonl", b"".join(kept))


def drop_derived(root: Path) -> None:
    """Remove what can be made again from the log: the index and assembly's place in the log."""
    for path in (*(root / "index").glob("*.sqlite*"), root / "assembly.json"):
        path.unlink(missing_ok=True)
