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
        for shard in self.manifest.shards:
            yield from _check_sealed(self.root, shard)
        for kind in KINDS:
            self._note_unlisted(kind)
        with tempfile.TemporaryDirectory() as folder:
            claims = Claims(None, Path(folder) / "keys.sqlite")
            try:
                for kind in ("contexts", "rejects"):
                    yield from self._rows(kind, claims)
            finally:
                claims.close()
        yield from self._samples(reassemble)
        final = self.manifest.final
        if final is None:
            self.notes.append("manifest.jsonl: no final line: the run is not finished")
        elif differing := [kind for kind in KINDS if final.get(kind) != self.counts[kind]]:
            yield f"manifest.jsonl: its final line counts other rows than there are of {', '.join(differing)}"

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
                    if claims.claim(row_key(row)) is Claim.REPEATED:
                        name = row.get("id") or row.get("origin")
                        yield f"{path}: row {row['seq']}: {name} has more than one outcome"

    def _samples(self, reassemble: Callable[[Iterator[Row], list[int]], Iterator[bytes]] | None) -> Problems:
        contexts = (row for path in self._paths("contexts") for row in frames.rows(path))
        again = reassemble(contexts, self.manifest.flushes) if reassemble is not None else None
        for path in self._paths("samples"):
            for row in frames.rows(path):
                yield from self._check_seq("samples", path, row)
                if any(not 0 <= seq < self.counts["contexts"] for seq in row["context_seqs"]):
                    yield f"{path}: sample {row['seq']} names contexts that are not in the log"
                if again is not None and next(again, None) != frames.line(row):
                    yield f"{path}: sample {row['seq']} is not what the log assembles to"
                    again = None  # all that follow would differ as well
        if again is not None and self.manifest.final is not None and next(again, None) is not None:
            yield "samples: there are fewer than the log assembles to"

    def _check_seq(self, kind: str, path: Path, row: Row) -> Problems:
        if row.get("seq") != self.counts[kind]:
            yield f"{path}: seq {self.counts[kind]} is next, not {row.get('seq')}"
        self.counts[kind] += 1

    def _paths(self, kind: str) -> Iterator[Path]:
        listed = {self.root / shard.path for shard in self.manifest.of_kind(kind)}
        yield from (path for path in shard_paths(self.root, self.manifest, kind) if path.exists())
        yield from sorted(
            path
            for path in (self.root / kind).glob("part-*")
            if path not in listed and path.suffix != OPEN_SUFFIX
        )


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
