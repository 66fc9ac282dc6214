"""Checks every guarantee of a run directory, by reading all of it."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from streamsyn.errors import ConfigError, SinkError
from streamsyn.sink import frames
from streamsyn.sink.finished import Claim, Claims
from streamsyn.sink.log import KINDS, row_key
from streamsyn.sink.manifest import Manifest, SealedShard
from streamsyn.sink.rundir import read_run_json
from streamsyn.sink.runlog import shard_paths
from streamsyn.sink.shard import OPEN_SUFFIX

Row = dict[str, Any]
Problems = Iterator[str]


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
        try:
            self.manifest = Manifest(root / "manifest.jsonl")
        except SinkError as error:
            raise ConfigError(str(error)) from error

    def problems(self, reassemble: Callable[[Iterator[Row], list[int]], Iterator[bytes]] | None) -> Problems:
        """Everything that is wrong, a line each.

        `reassemble` makes the lines of samples again from rows of contexts and the numbers of contexts
        at which streams ended; None passes that over.
        """
        if torn := self.manifest.torn_bytes:
            self.notes.append(f"manifest.jsonl: {torn} bytes of an unfinished line at its end")
        for kind in KINDS:
            self._note_unlisted(kind)
        for problem in self._log():
            reassemble = None  # there is no sound log to make samples of
            yield problem
        yield from self._samples(reassemble)
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
        for shard in self.manifest.shards:
            yield from _check_sealed(self.root, shard)
        with tempfile.TemporaryDirectory() as folder:
            claims = Claims(None, Path(folder) / "keys.sqlite")
            try:
                for kind in ("contexts", "rejects"):
                    yield from self._rows(kind, claims)
            finally:
                claims.close()

    def _note_unlisted(self, kind: str) -> None:
        listed = {shard.path for shard in self.manifest.of_kind(kind)}
        for path in sorted((self.root / kind).glob("part-*")):
            relative = str(path.relative_to(self.root))
            if path.suffix == OPEN_SUFFIX:
                good = max((end for end, _ in frames.scan(path)), default=0)
                if torn := path.stat().st_size - good:
                    self.notes.append(f"{relative}: {torn} bytes of an unfinished row at its end")
            elif relative not in listed:
                self.notes.append(f"{relative}: sealed, but the manifest was not told")

    def _rows(self, kind: str, claims: Claims) -> Problems:
        for path in self._paths(kind):
            with claims.batch():
                for row in frames.rows(path):
                    yield from self._check_seq(kind, path, row)
                    where = f"{self._name(path)}: row {row.get('seq')}"
                    try:
                        key = row_key(row)
                    except (KeyError, TypeError, ValueError, AttributeError):
                        yield f"{where} does not say which seed it is of"
                        continue
                    if claims.claim(key) is Claim.REPEATED:
                        yield f"{where}: {row.get('id') or row.get('origin')} has more than one outcome"

    def _samples(self, reassemble: Callable[[Iterator[Row], list[int]], Iterator[bytes]] | None) -> Problems:
        contexts = (row for path in self._paths("contexts") for row in frames.rows(path))
        again = reassemble(contexts, self.manifest.flushes) if reassemble is not None else None
        logged = range(self.counts["contexts"])
        for path in self._paths("samples"):
            for row in frames.rows(path):
                yield from self._check_seq("samples", path, row)
                where, seqs = f"{self._name(path)}: sample {row.get('seq')}", row.get("context_seqs")
                if not isinstance(seqs, list) or any(seq not in logged for seq in seqs):
                    yield f"{where} names contexts that are not in the log"
                if again is not None and next(again, None) != frames.line(row):
                    yield f"{where} is not what the log assembles to"
                    again = None  # all that follow would differ as well
        if again is not None and self._is_finished and next(again, None) is not None:
            yield "samples: there are fewer than the log assembles to"

    def _check_seq(self, kind: str, path: Path, row: Row) -> Problems:
        expected, seq = self._next_seq[kind], row.get("seq")
        if seq != expected:
            yield f"{self._name(path)}: seq {expected} is next, not {seq}"
        self._next_seq[kind] = (seq if isinstance(seq, int) else expected) + 1
        self.counts[kind] += 1

    def _paths(self, kind: str) -> Iterator[Path]:
        return (path for path in shard_paths(self.root, self.manifest, kind) if path.exists())

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root))


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
        while chunk := file.read(frames.CHUNK_BYTES):
            hashed.update(chunk)
    if hashed.hexdigest() != shard.sha256:
        yield f"{shard.path}: has changed since it was sealed (sha256); restore it from a copy"
    rows = sum(1 for _ in frames.rows(path))
    if rows != shard.rows:
        yield f"{shard.path}: {rows} rows, the manifest says {shard.rows}"


def drop_derived(root: Path) -> None:
    """Remove what can be made again from the log: the index and assembly's place in the log."""
    for path in (*(root / "index").glob("*.sqlite*"), root / "assembly.json"):
        path.unlink(missing_ok=True)
