"""What a run directory held at one moment, so that it can be read while a run is writing to it."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamsyn.sink import shards
from streamsyn.sink.manifest import Manifest, SealedShard
from streamsyn.sink.shards import KINDS, OPEN_SUFFIX

_TRIES = 1000


@dataclass(frozen=True, slots=True)
class Part:
    """A shard, and how much of it there was.

    Attributes:
        path: Its name once it is sealed, relative to the run directory.
        bytes: Those behind it have been written since.
        sealed: What the manifest says of it; None for one that it does not list.
        is_open: Whether it had its other name, that of an open shard.
    """

    root: Path
    path: str
    bytes: int
    sealed: SealedShard | None = None
    is_open: bool = False

    @property
    def name(self) -> str:
        """How it was called."""
        return self.path + (OPEN_SUFFIX if self.is_open else "")

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows that were there; none of a shard that cannot be read."""
        for _, some in self.scan():
            yield from some

    def scan(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """As `frames.scan`, under whichever name the shard has by now."""
        names = (self.path,) if self.sealed else (self.path + OPEN_SUFFIX, self.path)
        for name in names:
            with suppress(OSError):
                for end, some in shards.scan(self.root / name):
                    if end > self.bytes:
                        return
                    yield end, some
                return


class Snapshot:
    """The manifest of a run directory, and the shards of each kind, in order, as of one moment.

    Samples are measured before contexts: those that they are made of are all there.

    Raises:
        SinkError: The manifest is broken.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        path = root / "manifest.jsonl"
        for _ in range(_TRIES):
            size = _size(path)
            self.manifest = Manifest(path)
            self.torn_bytes = self.manifest.torn_bytes
            self.parts = {kind: self._parts(kind) for kind in reversed(KINDS)}
            if _size(path) == size:  # else a shard was sealed meanwhile, and may be missing from the parts
                return

    def _parts(self, kind: str) -> list[Part]:
        listed = self.manifest.of_kind(kind)
        parts = [Part(self._root, shard.path, shard.bytes, shard) for shard in listed]
        return parts + [part for name in self._unlisted(kind) if (part := self._unsealed(f"{kind}/{name}"))]

    def _unlisted(self, kind: str) -> list[str]:
        listed = {Path(shard.path).name for shard in self.manifest.of_kind(kind)}
        names = {path.name.removesuffix(OPEN_SUFFIX) for path in (self._root / kind).glob("part-*")}
        # A file that is renamed while its folder is listed may be missing from the list.
        names |= {f"part-{len(listed):06d}{suffix}" for suffix in shards.SUFFIXES.values()}
        return sorted(names - listed)

    def _unsealed(self, path: str) -> Part | None:
        for is_open, name in ((True, path + OPEN_SUFFIX), (False, path)):
            if (size := _size(self._root / name)) is not None:
                return Part(self._root, path, size, is_open=is_open)
        return None


def _size(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return None
