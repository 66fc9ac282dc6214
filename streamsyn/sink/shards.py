"""The bytes of a shard on disk: written append by append, and read back up to the first torn part.

Plain: a row is one line of JSON; a line that does not end or does not parse is torn. zstd: each append
is one frame with a checksum; a frame that does not end or does not match its checksum is torn.

A shard that still grows is named `part-NNNNNN.jsonl[.zst].open`. Sealing renames it to its final name;
from then on it never changes.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import orjson

from streamsyn.io.durable import sync_folder
from streamsyn.sink.epoch import Epoch
from streamsyn.sink.manifest import SealedShard

KINDS = ("contexts", "rejects", "samples")
"""The kinds of rows, each with a folder of shards of its own."""
SUFFIXES = {"none": ".jsonl", "zstd": ".jsonl.zst"}
"""The suffix of a sealed shard, by `sink.compression`."""
OPEN_SUFFIX = ".open"
CHUNK_BYTES = 1 << 20
"""Bytes read at a time."""
_CLOSED = -1


class OpenShard:
    """A shard that still grows.

    What `append` has returned from survives a kill of this process. What was appended before a `sync` that
    has returned survives a loss of power. One thread may append while another syncs.

    Args:
        path: The final name; the file has OPEN_SUFFIX behind it until `seal`.
        kind: One of KINDS.
        first_seq: The seq of its first row.
        epoch: That of this process.
        is_new: Whether the file is made where it does not exist.

    Raises (all methods):
        OSError: The disk failed.
        TakenOver: A newer process writes to the run directory.
    """

    def __init__(self, path: Path, kind: str, first_seq: int, epoch: Epoch, *, is_new: bool = True) -> None:
        self.path = path
        self.open_path = path.with_name(path.name + OPEN_SUFFIX)
        self._kind = kind
        self._compression = "zstd" if path.suffix == ".zst" else "none"
        self._first_seq = first_seq
        self._empty()
        self._epoch = epoch
        create = os.O_CREAT if is_new else 0
        self._fd = os.open(self.open_path, os.O_RDWR | create | os.O_APPEND, 0o644)
        self._writing = Lock()
        """Held to write, and to replace the file."""
        self._is_in_folder = False
        """Whether the folder's entry for it is synced."""

    def _empty(self) -> None:
        """Begin with no rows."""
        self.rows = 0
        self.bytes = 0
        self._sha256 = hashlib.sha256()
        self._tokens = {"prompt": 0, "cached": 0, "completion": 0}
        self._models: set[str] = set()

    @property
    def next_seq(self) -> int:
        """The seq of the next row."""
        return self._first_seq + self.rows

    def recover(self) -> list[dict[str, Any]]:
        """Cut off a torn tail and resume behind it; returns the rows kept, without their long texts."""
        while True:
            self._empty()
            good, kept = 0, []
            for end, some in scan(self.open_path):
                if [row.get("seq") for row in some] != list(range(self.next_seq, self.next_seq + len(some))):
                    break
                good = end
                self._count(some)
                kept += [{name: row.get(name) for name in ("seq", "seed_id", "draft", "key")} for row in some]
            named = self._epoch.keep_name(self._fd, self.open_path)
            if named == self._fd:  # otherwise it may not have been this file that was read
                break
            self._fd = named
        self._epoch.check()
        os.ftruncate(self._fd, good)
        self.sync()  # the earlier run may have been killed before it synced what was read here
        self.bytes = good
        with self.open_path.open("rb") as file:
            self._sha256 = hashlib.file_digest(file, "sha256")
        return kept

    def append(self, lines: Sequence[bytes], counted: Iterable[Mapping[str, Any]]) -> None:
        """Write whole rows with one append; after an error the shard is as it was.

        Args:
            lines: One line of JSON a row.
            counted: Of each row, the token numbers and the model that the manifest adds up; may be empty.
        """
        data = encode(b"".join(lines), self._compression)
        self._epoch.check()
        with self._writing:
            try:
                left = memoryview(data)
                while left:
                    left = left[os.write(self._fd, left) :]
            except OSError:
                with suppress(OSError):  # a torn tail that stays is cut by the next run
                    os.ftruncate(self._fd, self.bytes)
                raise
        self._sha256.update(data)
        self.bytes += len(data)
        self._count(counted)

    def sync(self) -> None:
        """Sync the file to disk. A different thread may append meanwhile."""
        if self._fd != _CLOSED:
            os.fsync(self._fd)
            with self._writing:
                self._fd = self._epoch.keep_name(self._fd, self.open_path)
            self._epoch.check()
            if not self._is_in_folder:
                sync_folder(self.path.parent)
                self._is_in_folder = True

    def close(self) -> None:
        """Sync and close the file, which stays open to a later run under its present name."""
        try:
            self.sync()
        finally:
            self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, _CLOSED  # the number may soon belong to a different file
        if fd != _CLOSED:
            os.close(fd)

    def seal(self, root: Path) -> SealedShard:
        """Sync, close and rename to the final name; returns the entry to be added to the manifest."""
        sealed = SealedShard(
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
        orjson.dumps(sealed)  # an entry that cannot be encoded fails here, while the shard is still open
        try:
            self.sync()
            this = os.fstat(self._fd)
        finally:
            self._close()
        try:
            self.open_path.rename(self.path)
        except FileNotFoundError:  # an older process may just have done that
            if not os.path.samestat(this, self.path.stat()):
                raise
        sync_folder(self.path.parent)
        return sealed

    def _count(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            self.rows += 1
            for name in self._tokens:
                self._tokens[name] += row.get(f"{name}_tokens") or 0
            if model := row.get("model"):
                self._models.add(str(model))  # servers may report anything as their model


def line(row: dict[str, Any]) -> bytes:
    """A row as the line of JSON that the log holds."""
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def encode(lines: bytes, compression: str) -> bytes:
    """Whole lines as the bytes of one append."""
    if compression == "none":
        return lines
    import zstandard

    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(lines)


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a shard, open or sealed; ends before the first torn part."""
    for _, some in scan(path):
        yield from some


def scan(path: Path, start: int = 0) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The rows of a shard, open or sealed, in groups; ends before the first torn part.

    Args:
        path: The shard.
        start: Byte offset to begin at: the start of a line or of a zstd frame.

    Yields:
        The byte offset behind a line (plain) or a frame (zstd), and its rows.
    """
    for end, data in parts(path, start):
        decoded = _decode(data)
        if decoded is None:
            return
        yield end, decoded


def parts(path: Path, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """The lines (plain) or decompressed frames (zstd) of a shard that are whole, each with the byte offset
    behind it. Lines are not decoded, so one may still be damaged.

    Args:
        path: The shard.
        start: Byte offset to begin at: the start of a line or of a zstd frame.
    """
    return _zstd_frames(path, start) if is_compressed(path) else _lines(path, start)


def split(data: bytes) -> list[bytes]:
    """Split into lines, each with its end; the last one may lack it.

    By memchr(3): thirty times as fast as `splitlines`, which looks for other ends as well.
    """
    lines, start = [], 0
    while end := data.find(b"\n", start) + 1:
        lines.append(data[start:end])
        start = end
    return lines if start == len(data) else [*lines, data[start:]]


def is_compressed(path: Path) -> bool:
    """Whether a shard, open or sealed, is compressed with zstd."""
    return ".zst" in path.suffixes


def _decode(data: bytes) -> list[dict[str, Any]] | None:
    """The rows of some lines; None when one of them is not a JSON object."""
    try:
        decoded = [orjson.loads(line) for line in split(data)]
    except orjson.JSONDecodeError:
        return None
    return decoded if all(isinstance(row, dict) for row in decoded) else None


def _lines(path: Path, end: int) -> Iterator[tuple[int, bytes]]:
    with path.open("rb", buffering=CHUNK_BYTES) as file:
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
