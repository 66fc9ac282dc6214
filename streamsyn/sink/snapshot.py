"""What a run directory holds at one moment, so that it can be read while a run writes to it.

Not all its rejects hold: a retry asks some again, and an outcome that comes of it supersedes its reject. A
row of contexts or rejects with `supersedes` names the reject, by `seq`, that no longer holds. Whoever counts
or shows rejects leaves out those in `superseded`. Retries are lines of the manifest; until the next final
line, the rejects that they reopen and that still hold are `open_rejects`.
"""

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamsyn.errors import SinkError
from streamsyn.io.durable import disk_errors
from streamsyn.sink import shards
from streamsyn.sink.manifest import Manifest, SealedShard, removed_rows
from streamsyn.sink.shards import KINDS, OPEN_SUFFIX

_TRIES = 1000


@dataclass(frozen=True, slots=True)
class Part:
    """A shard as it was at the time of the snapshot.

    Attributes:
        root: The run directory.
        path: Its final name, relative to the run directory.
        bytes: Its size then; bytes behind it were written later.
        sealed: The manifest's entry; None when the manifest does not list it.
        is_open: Whether it had the name of an open shard.
        is_removed: Whether retention has removed it.
    """

    root: Path
    path: str
    bytes: int
    sealed: SealedShard | None = None
    is_open: bool = False
    is_removed: bool = False

    @property
    def name(self) -> str:
        """Its name then, relative to the run directory."""
        return self.path + (OPEN_SUFFIX if self.is_open else "")

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows it had then; none when the shard cannot be read."""
        for _, some in self.scan():
            yield from some

    def scan(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Its rows with their offsets, as `shards.scan`, under whichever name the shard has now."""
        names = (self.path,) if self.sealed else (self.path + OPEN_SUFFIX, self.path)
        for name in names:
            with suppress(OSError):
                for end, some in shards.scan(self.root / name):
                    if end > self.bytes:
                        return
                    yield end, some
                return


class Snapshot:
    """The manifest of a run directory, and the shards of each kind in order, at one moment.

    Samples are listed before contexts, so that all contexts they were made of are included.

    Raises:
        SinkError: The manifest has an invalid line, or removed.json is damaged.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        path = root / "manifest.jsonl"
        for _ in range(_TRIES):
            size = _size(path)
            self.manifest = Manifest(path)
            self.torn_bytes = self.manifest.torn_bytes
            self.parts = {kind: self._parts(kind) for kind in reversed(KINDS)}
            if _size(path) == size:  # otherwise a shard was sealed meanwhile, and may be missing
                return

    def _parts(self, kind: str) -> list[Part]:
        listed = self.manifest.of_kind(kind)
        removed = removed_rows(self._root) if kind == "samples" else 0
        parts = [
            Part(self._root, shard.path, shard.bytes, shard, is_removed=shard.last_seq < removed)
            for shard in listed
        ]
        for name in self._unlisted(kind):
            part = self._unsealed(f"{kind}/{name}")
            if part is not None and (not part.is_open or _continues(parts, part)):
                parts.append(part)
        return parts

    def _unlisted(self, kind: str) -> list[str]:
        listed = {Path(shard.path).name for shard in self.manifest.of_kind(kind)}
        paths = (self._root / kind).glob("part-*")
        names = {path.name.removesuffix(OPEN_SUFFIX) for path in paths if not _is_replaced(path.name, listed)}
        # A file that is renamed while its folder is listed can be missing from the listing.
        names |= {f"part-{len(listed):06d}{suffix}" for suffix in shards.SUFFIXES.values()}
        return sorted(names - listed)

    def _unsealed(self, path: str) -> Part | None:
        for is_open, name in ((True, path + OPEN_SUFFIX), (False, path)):
            if (size := _size(self._root / name)) is not None:
                return Part(self._root, path, size, is_open=is_open)
        return None


def _continues(parts: list[Part], part: Part) -> bool:
    """Whether an open shard continues those before it; otherwise a run that resumes drops it.

    An open shard before it may have lost rows, or all of it, by a loss of power.
    """
    if not Path(part.path).name.startswith(f"part-{len(parts):06d}."):
        return False
    if not parts or parts[-1].sealed:
        return True
    last = None
    for row in parts[-1].rows():
        last = row.get("seq")
    first = next(part.rows(), {}).get("seq")
    return isinstance(last, int) and first == last + 1


def _is_replaced(name: str, listed: Collection[str]) -> bool:
    """Whether a listed shard of this number has a name of its epoch: in a mirror where the name was taken."""
    return any(one.startswith(f"{name[:11]}.e") for one in listed)


def _size(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return None


class SeqSet:
    """A set of row numbers, one bit each up to the greatest."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._size = 0

    def add(self, seq: int) -> None:
        """Add a number; one that is in the set already changes nothing."""
        if seq in self:
            return
        self._bits.extend(bytes(max(0, seq // 8 + 1 - len(self._bits))))
        self._bits[seq // 8] |= 1 << seq % 8
        self._size += 1

    def __contains__(self, seq: object) -> bool:
        if not isinstance(seq, int):
            return False
        return 0 <= seq // 8 < len(self._bits) and bool(self._bits[seq // 8] & 1 << seq % 8)

    def __len__(self) -> int:
        return self._size


def superseded(snapshot: Snapshot) -> SeqSet:
    """The rejects that no longer hold, by `seq`. Reads the outcomes since the first retry."""
    found = SeqSet()
    retries = snapshot.manifest.retries
    if retries:
        for kind, first in (("contexts", retries[0].contexts), ("rejects", retries[0].rejects)):
            for part in snapshot.parts[kind]:
                for row in _rows_from(part, first):
                    if (seq := superseded_by(row)) is not None:
                        found.add(seq)
    return found


def superseded_by(row: dict[str, Any]) -> int | None:
    """The `seq` of the reject that a row of contexts or rejects supersedes; None where it supersedes none."""
    seq = row.get("supersedes")
    return seq if isinstance(seq, int) and seq >= 0 else None


def open_rejects(snapshot: Snapshot, gone: SeqSet) -> Iterator[dict[str, Any]]:
    """The rows of rejects that retries reopened and that still hold; `gone` are the superseded ones."""
    retries = snapshot.manifest.open_retries
    for part in snapshot.parts["rejects"] if retries else ():
        for row in part.rows():
            if row["seq"] not in gone and any(retry.reopens(row) for retry in retries):
                yield row


def holding_rejects(snapshot: Snapshot) -> Iterator[dict[str, Any]]:
    """The rows of rejects that hold."""
    gone = superseded(snapshot)
    for part in snapshot.parts["rejects"]:
        for row in part.rows():
            if row.get("seq") not in gone:
                yield row


def _rows_from(part: Part, first_seq: int) -> Iterator[dict[str, Any]]:
    if part.sealed is None or part.sealed.last_seq >= first_seq:
        yield from part.rows()


def shard_paths(root: Path, manifest: Manifest, kind: str, first_seq: int = 0) -> Iterator[Path]:
    """The shards of a kind that hold rows from `first_seq` on, in order; the open one is the last."""
    listed = manifest.of_kind(kind)
    for shard in listed:
        if shard.last_seq >= first_seq:
            yield root / shard.path
    # The rest: shards sealed since, one sealed by a run that was killed before it was listed, the open one.
    known = {root / shard.path for shard in listed}
    names = {path.name for path in known}
    paths = (root / kind).glob("part-*")
    found = {path for path in paths if path not in known and not _is_replaced(path.name, names)}
    # If a shard has both names, the sealed one is what an older process left, too late (`epoch`).
    yield from sorted(path for path in found if path.with_name(path.name + OPEN_SUFFIX) not in found)


def read_rows(
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
