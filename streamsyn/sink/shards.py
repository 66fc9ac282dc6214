"""How rows lie in a shard, so that a torn end is found.

Plain: a row is a line of JSON; one that does not end, or does not parse, is torn. zstd: each append
is a frame of its own with a checksum; a frame that does not end or check is torn.

One shard being written: append, sync, seal.
"""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from streamsyn.io.durable import sync_folder
from streamsyn.sink.manifest import SealedShard

KINDS = ("contexts", "rejects", "samples")


CHUNK_BYTES = 1 << 20
SUFFIXES = {"none": ".jsonl", "zstd": ".jsonl.zst"}


def line(row: dict[str, Any]) -> bytes:
    """A row as the log has it."""
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def encode(lines: bytes, compression: str) -> bytes:
    """The bytes to append for some whole lines."""
    if compression == "none":
        return lines
    import zstandard

    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(lines)


def scan(path: Path, start: int = 0) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Rows of a shard, open or sealed, with the offset behind them; ends before the first torn part.

    Args:
        path: The shard.
        start: The offset at which a row, or a frame, begins.
    """
    parts = _zstd_frames(path, start) if ".zst" in path.suffixes else _lines(path, start)
    for end, data in parts:
        rows = _decode(data)
        if rows is None:
            return
        yield end, rows


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a shard without their offsets."""
    for _, some in scan(path):
        yield from some


def _decode(data: bytes) -> list[dict[str, Any]] | None:
    try:
        decoded = [orjson.loads(line) for line in data.splitlines()]
    except orjson.JSONDecodeError:
        return None
    return decoded if all(isinstance(row, dict) for row in decoded) else None


def _lines(path: Path, end: int) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        file.seek(end)
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield end, line


def _zstd_frames(path: Path, end: int) -> Iterator[tuple[int, bytes]]:
    import zstandard

    with path.open("rb") as file:
        file.seek(end)
        pending = file.read(CHUNK_BYTES)
        while pending:
            frame = zstandard.ZstdDecompressor().decompressobj()
            parts = []
            while pending and not frame.eof:
                try:
                    parts.append(frame.decompress(pending))
                except zstandard.ZstdError:
                    return
                end += len(pending)
                pending = frame.unused_data if frame.eof else file.read(CHUNK_BYTES)
            if not frame.eof:
                return
            end -= len(pending)
            yield end, b"".join(parts)
            pending = pending or file.read(CHUNK_BYTES)


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
        for end, some in scan(self.open_path):
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
            while chunk := file.read(CHUNK_BYTES):
                self._sha256.update(chunk)
        return kept

    def append(self, lines: bytes) -> None:
        """Write whole lines."""
        data = encode(lines, self._compression)
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
