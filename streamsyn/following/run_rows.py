"""The rows of a run directory while the run goes on: sealed shards, then the open one; and waiting for more.

A run that was killed may cut off a torn end and everything after it. Samples that were read before are then
written again with the same seq and the same bytes (they are a pure function of the log), so that reading
just continues. Contexts and rejects that a loss of power took back before they were synced are lost: what is
written in their place may differ.
"""

import asyncio
import ctypes
import os
import select
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

import orjson
import structlog

from streamsyn.errors import RowsRemoved, RunReplaced, SinkError
from streamsyn.following.shard_lines import Cursor, read_lines, seek
from streamsyn.sink.manifest import Manifest, SealedShard, removed_rows
from streamsyn.sink.rundir import read_run_json
from streamsyn.sink.shards import CHUNK_BYTES, KINDS, OPEN_SUFFIX, SUFFIXES, is_compressed

log = structlog.get_logger()

Rows: TypeAlias = list[dict[str, Any]]

_NEAR_ROWS: Final = 64
"""Rows this near behind the cursor are not searched for: they may be in the frame that begins there."""
_LOOK_EVERY_S: Final = 0.5
"""Maximum time between two looks, with or without a notification."""
_MODIFY, _MOVED_TO, _CREATE = 0x2, 0x80, 0x100  # inotify(7)


@dataclass(frozen=True, slots=True)
class _Listing:
    """What a manifest lists of one kind.

    Attributes:
        file: Identifies the state of the file.
        shards: The sealed shards.
        ends: The last seq of each shard.
        total: Number of rows, if the last line is `final`.
        unsealed: Where a run that is taken up after its end would write its next rows of each kind.
    """

    file: tuple[int, ...] = ()
    shards: tuple[SealedShard, ...] = ()
    ends: tuple[int, ...] = ()
    total: int | None = None
    unsealed: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Number of rows in sealed shards."""
        return self.ends[-1] + 1 if self.ends else 0


class RunRows:
    """The rows of one kind that a run writes, numbered from 0, as far as they have been written.

    The directory need not exist yet. If it disappears, `stream.gone` is logged, and reading continues when it
    comes back. All methods block on the disk. Threads may share an object if each has its own `Cursor`.

    Args:
        root: The run directory.
        kind: `samples`, `contexts` or `rejects`.
        run: The run that is expected; None for whichever is there first.

    Raises (all methods):
        RunReplaced: The directory holds a different run than at the first look.
        RowsRemoved: Retention has removed the rows that are asked for.
        ConfigError: The run has an unknown format.
        SinkError: A row that must exist cannot be read; the message names it.
    """

    def __init__(self, root: Path, kind: str = "samples", run: float | None = None) -> None:
        self.root = root
        self.kind = kind
        self._run_json: tuple[tuple[int, ...], float | None] = ((), run)
        """Identifies the run.json file read last, empty before there was one; and the run."""
        self._is_gone = False
        self._listing = _Listing()
        self._cursor = Cursor()

    @property
    def folders(self) -> tuple[Path, Path]:
        """The folders in which files change when rows come."""
        return self.root, self.root / self.kind

    @property
    def run(self) -> float | None:
        """Identifies the run: its `created_at`, which no resume changes; None while there is no run.json."""
        return self._run_json[1]

    def lines(
        self, first: int, limit: int, max_bytes: int = CHUNK_BYTES, cursor: Cursor | None = None
    ) -> list[bytes]:
        """The lines of the rows `first`, `first + 1`, ... as the shards hold them, with their ends.

        A row anywhere in a large shard is found without reading the shard from its beginning.

        Args:
            first: Number of the first row.
            limit: Maximum number of lines.
            max_bytes: Stop after this many bytes; more by one line, or by the rows of one zstd frame.
            cursor: Where this reader is in the shards; each reader that shares this object needs one.

        Returns:
            At least one line, or none if row `first` has not been written yet.
        """
        cursor = self._cursor if cursor is None else cursor
        found: list[bytes] = []
        size = 0
        with self._os_errors():
            listing = self._update()
            while len(found) < limit and size < max_bytes:
                seq, left = first + len(found), limit - len(found)
                try:
                    some = self._read(listing, seq, left, max_bytes - size, cursor)
                except FileNotFoundError:
                    self._refuse_removed(seq)
                    raise
                if not some:
                    break
                found += some
                size += sum(map(len, some))
            self._check_run()  # what was read may belong to a different run by now
        return found

    def rows(
        self, first: int, limit: int, max_bytes: int = CHUNK_BYTES, cursor: Cursor | None = None
    ) -> Rows:
        """As `lines`, decoded."""
        found: Rows = []
        for seq, line in enumerate(self.lines(first, limit, max_bytes, cursor), first):
            try:
                found.append(orjson.loads(line))
            except orjson.JSONDecodeError as error:
                listing = self._listing
                if seq >= listing.rows:
                    break  # damaged by a loss of power: the run will cut it off and write it again
                self._refuse(listing.shards[bisect_left(listing.ends, seq)].path, seq, None, error)
        return found

    def total(self) -> int | None:
        """Number of rows when the run has ended; None while more may come.

        A run has ended when `final` is the last line of its manifest. One that was taken up again, by a retry
        or with new seeds, counts as live from its first new row on, until its next end.
        """
        with self._os_errors():
            listing = self._update()
            if listing.total is None or any(_size(self.root / name) for name in listing.unsealed):
                return None
        return listing.total

    @contextmanager
    def _os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SinkError(f"cannot read {error.filename or self.root}: {error.strerror}") from error

    def _update(self) -> _Listing:
        """Read the manifest if it has changed."""
        self._check_run()
        path = self.root / "manifest.jsonl"
        try:
            status = path.stat()
        except FileNotFoundError:
            return self._listing
        file = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if file != self._listing.file:
            self._listing = self._read_manifest(path, file)
        return self._listing

    def _read_manifest(self, path: Path, file: tuple[int, ...]) -> _Listing:
        manifest = Manifest(path)
        sealed = tuple(manifest.of_kind(self.kind))
        ends = tuple(shard.last_seq for shard in sealed)
        if manifest.final is None:
            return _Listing(file, sealed, ends)
        total = ends[-1] + 1 if ends else 0
        if total != manifest.final.get(self.kind, total):
            raise SinkError(f"{path} does not list all shards of {self.kind}; run `streamsyn verify`")
        unsealed = tuple(
            name + OPEN_SUFFIX for kind in KINDS for name in _names(kind, len(manifest.of_kind(kind)))
        )
        return _Listing(file, sealed, ends, total, unsealed)

    def _check_run(self) -> None:
        """Read run.json if it was replaced (each resume of a run writes it anew), and compare the run."""
        before, run = self._run_json
        try:
            status = (self.root / "run.json").stat()
        except (FileNotFoundError, NotADirectoryError):
            if before and not self._is_gone:
                log.warning("stream.gone", directory=str(self.root), why="its run.json was there before")
            self._is_gone = bool(before)
            return
        self._is_gone = False
        seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if seen == before or (saved := read_run_json(self.root)) is None:
            return
        created = saved.get("created_at")
        if (before or run is not None) and created != run:
            raise RunReplaced(f"{self.root} now holds a different run than before")
        self._run_json = seen, created

    def _read(self, listing: _Listing, seq: int, limit: int, max_bytes: int, cursor: Cursor) -> list[bytes]:
        """Lines from `seq` on from the shard that holds it; none if it has not been written yet."""
        if seq >= listing.rows:
            return self._read_open(listing, seq, limit, max_bytes, cursor)
        shard = listing.shards[bisect_left(listing.ends, seq)]
        if seq < shard.first_seq:
            self._refuse(shard.path, seq, shard.first_seq)
        path = self.root / shard.path
        limit = min(limit, shard.last_seq + 1 - seq)
        _move(path, cursor, shard.path, shard.first_seq, seq)
        found, odd = read_lines(path, cursor, seq, limit, max_bytes)
        if not found:
            # The run may have been resumed since, and have written the shard with different frames.
            cursor.offset, cursor.seq = 0, shard.first_seq
            seek(path, cursor, seq)
            found, odd = read_lines(path, cursor, seq, limit, max_bytes)
        if not found:
            self._refuse(shard.path, seq, odd)
        return found

    def _read_open(
        self, listing: _Listing, seq: int, limit: int, max_bytes: int, cursor: Cursor
    ) -> list[bytes]:
        for shard in _names(self.kind, len(listing.shards)):
            for name in (shard + OPEN_SUFFIX, shard):  # it may have been sealed in between
                try:
                    return self._read_growing(
                        self.root / name, shard, listing.rows, seq, limit, max_bytes, cursor
                    )
                except FileNotFoundError:
                    continue
        return []

    def _read_growing(
        self, path: Path, shard: str, first_seq: int, seq: int, limit: int, max_bytes: int, cursor: Cursor
    ) -> list[bytes]:
        status = path.stat()
        _move(path, cursor, shard, first_seq, seq)
        if status.st_size == cursor.offset:
            return []
        found, odd = read_lines(path, cursor, seq, limit, max_bytes)
        is_growing = odd is None and status.st_size > cursor.offset and not is_compressed(path)
        searched = (shard, status.st_size, status.st_mtime_ns)
        if found or is_growing or searched == cursor.searched:
            return found  # nothing, if the next row is not whole yet
        # The run may have been resumed, and have written different bytes after what it cut off.
        cursor.searched = searched
        again = Cursor(shard, 0, first_seq)
        seek(path, again, seq)
        found, odd = read_lines(path, again, seq, limit, max_bytes)
        if found:
            cursor.offset, cursor.seq = again.offset, again.seq
        elif odd is not None and odd >= 0:
            self._refuse(shard, seq, odd)
        return found

    def _refuse_removed(self, seq: int) -> None:
        if self.kind == "samples" and seq < (first := removed_rows(self.root)):
            raise RowsRemoved(
                f"{self.root}: samples before row {first} were removed by retention (row {seq} was asked "
                "for); the mirror of the run has them",
                first,
            )

    def _refuse(self, shard: str, seq: int, odd: int | None, cause: Exception | None = None) -> NoReturn:
        missing = odd is not None and odd >= 0
        what = f"is missing: row {odd} comes in its place" if missing else "is damaged or missing"
        raise SinkError(f"{self.root / shard}: row {seq} {what}; run `streamsyn verify`") from cause


def _size(path: Path) -> int:
    """The size of a file in bytes; 0 if it does not exist."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _names(kind: str, number: int) -> list[str]:
    """The names that shard `number` of a kind may have once it is sealed."""
    return [f"{kind}/part-{number:06d}{suffix}" for suffix in SUFFIXES.values()]


def _move(path: Path, cursor: Cursor, shard: str, first_seq: int, seq: int) -> None:
    """Move the cursor into a shard, at or before a row and near to it."""
    if cursor.shard != shard or cursor.seq > seq:
        cursor.shard, cursor.offset, cursor.seq = shard, 0, first_seq
    if seq - cursor.seq > _NEAR_ROWS:
        seek(path, cursor, seq)


class FolderWatch:
    """Waits for changes in folders. Only a hint: NFS sends no notifications, and the kernel limits their
    number, so that a wait ends after half a second at the latest.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = -1
        if hasattr(self._libc, "inotify_init1"):
            self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)

    def add(self, folders: Iterable[Path]) -> None:
        """Watch those of the folders that exist by now; call it again before each look. May block."""
        if self._fd < 0:
            return
        for folder in folders:
            self._libc.inotify_add_watch(self._fd, os.fsencode(folder), _MODIFY | _MOVED_TO | _CREATE)

    async def changed(self, timeout_s: float) -> None:
        """Return when something has changed since the last call, and after half a second at the latest."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        if self._fd >= 0:
            loop.add_reader(self._fd, changed.set)
        try:
            async with asyncio.timeout(min(timeout_s, _LOOK_EVERY_S)):
                await changed.wait()
            self._forget()
        except TimeoutError:
            return
        finally:
            if self._fd >= 0:
                loop.remove_reader(self._fd)

    def wait(self, timeout_s: float) -> None:
        """As `changed`, blocking."""
        files = [self._fd] if self._fd >= 0 else []
        ready, _, _ = select.select(files, [], [], min(timeout_s, _LOOK_EVERY_S))
        if ready:
            self._forget()

    def close(self) -> None:
        """Stop watching. May be called more than once."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _forget(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._fd, 1 << 16)
