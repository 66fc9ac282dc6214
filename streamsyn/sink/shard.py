"""One shard being written: append, sync, seal."""

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from streamsyn.sink import frames
from streamsyn.sink.manifest import SealedShard

OPEN_SUFFIX = ".open"
_CLOSED = -1


class OpenShard:
    """A shard that still grows, as `part-NNNNNN.jsonl.open`; sealing renames it to its name.

    What `append` has returned from survives a kill of this process; what `sync` has returned from
    survives a loss of power.
    """

    def __init__(self, path: Path, kind: str, first_seq: int) -> None:
        self.path = path
        self._kind = kind
        self._compression = "zstd" if path.suffix == ".zst" else "none"
        self._first_seq = first_seq
        self.rows = 0
        self.bytes = 0
        self._sha256 = hashlib.sha256()
        self._tokens = {"prompt": 0, "cached": 0, "completion": 0}
        self._models: set[str] = set()
        self._fd = os.open(self.open_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sync_folder(path.parent)

    @property
    def open_path(self) -> Path:
        """Where the shard lies until it is sealed."""
        return self.path.with_name(self.path.name + OPEN_SUFFIX)

    @property
    def next_seq(self) -> int:
        """The seq of the row that comes next."""
        return self._first_seq + self.rows

    def recover(self) -> list[dict[str, Any]]:
        """Cut a torn end off and take up the rest; its rows, less their long texts."""
        good, kept = 0, []
        for end, some in frames.scan(self.open_path):
            if [row.get("seq") for row in some] != list(range(self.next_seq, self.next_seq + len(some))):
                break
            good = end
            for row in some:
                self.count(row)
                kept.append({name: row.get(name) for name in ("seq", "seed_id", "draft", "key")})
        os.ftruncate(self._fd, good)
        os.fsync(self._fd)  # what was read back may not have been synced by the one who wrote it
        self.bytes = good
        self._sha256 = hashlib.sha256()
        with self.open_path.open("rb") as file:
            while chunk := file.read(frames.CHUNK_BYTES):
                self._sha256.update(chunk)
        return kept

    def append(self, lines: bytes) -> None:
        """Write whole lines."""
        data = frames.encode(lines, self._compression)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError:
            with suppress(OSError):  # what stays is a torn end, which the next run cuts
                os.ftruncate(self._fd, self.bytes)
            raise
        self._sha256.update(data)
        self.bytes += len(data)

    def count(self, row: dict[str, Any]) -> None:
        """Add a row's figures to those of the shard."""
        self.rows += 1
        for name in self._tokens:
            self._tokens[name] += row.get(f"{name}_tokens") or 0
        if model := row.get("model"):
            self._models.add(str(model))  # a server may call itself anything

    def sync(self) -> None:
        """Have the kernel put everything on disk."""
        if self._fd != _CLOSED:
            os.fsync(self._fd)

    def close(self) -> None:
        """Sync and leave the shard open on disk, for a later run to go on with."""
        fd, self._fd = self._fd, _CLOSED  # the number may soon be that of another file
        if fd == _CLOSED:
            return
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def seal(self, root: Path) -> SealedShard:
        """Give the shard its name; from now on it never changes."""
        sealed = self._sealed(root)
        orjson.dumps(sealed)  # what the manifest could not hold fails here, while the shard is open
        self.close()
        self.open_path.rename(self.path)
        sync_folder(self.path.parent)
        return sealed

    def _sealed(self, root: Path) -> SealedShard:
        return SealedShard(
            kind=self._kind,
            path=str(self.path.relative_to(root)),
            rows=self.rows,
            bytes=self.bytes,
            sha256=self._sha256.hexdigest(),
            first_seq=self._first_seq,
            last_seq=self.next_seq - 1,
            tokens=self._tokens,
            model=",".join(sorted(self._models)),
            sealed_at=time.time(),
        )


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on disk: a new or renamed file is only then sure to be found."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
