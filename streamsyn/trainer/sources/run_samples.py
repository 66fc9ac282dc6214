"""The samples of a run directory as a source, while the run goes on: sealed shards, then the open one.

A run that was killed may cut off a torn end and everything after it. Rows that were read before are then
written again with the same seq and the same bytes (samples are a pure function of the log), so that reading
just continues.
"""

import asyncio
import ctypes
import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import structlog

from streamsyn.errors import SinkError
from streamsyn.sink import shards
from streamsyn.sink.manifest import Manifest, SealedShard
from streamsyn.sink.rundir import read_run_json
from streamsyn.sink.shards import OPEN_SUFFIX, SUFFIXES
from streamsyn.trainer.examples import Row

log = structlog.get_logger()

Rows: TypeAlias = list[dict[str, Any]]

_KIND = "samples"
_SPAN = 64
"""`pick` reads this many neighbouring rows at once, wanted or not: each read decompresses a whole frame of
rows."""
_LOOK_EVERY_S = 0.5
"""Maximum time between two looks, with or without a notification."""

_MODIFY, _MOVED_TO, _CREATE = 0x2, 0x80, 0x100  # inotify(7)


class RunSamples:
    """Source: the samples that a run writes. They end when the last line of the manifest is `final`.

    The directory need not exist yet. If it disappears, `stream.gone` is logged, and reading continues when it
    comes back. A different run in its place is an error.

    Args:
        root: The run directory.
    """

    name = "run"

    def __init__(self, root: Path) -> None:
        self._root = root
        self._watch = FolderWatch()
        self._run_json: tuple[int, ...] = ()
        """Identifies the run.json file read last; empty before there was one."""
        self._run: Any = None
        """The run's `created_at`, which no resume changes."""
        self._is_gone = False
        self._shards: list[SealedShard] = []
        self._ends: list[int] = []
        """The last seq of each shard."""
        self._total: int | None = None
        self._manifest_file: tuple[int, ...] = ()
        self._cursor = Cursor()
        self._scanned: tuple[str, int, int] | None = None
        """An open shard that was scanned from its start without finding the row: name, size, time of
        change."""

    def fetch(self, first: int, limit: int) -> list[Row]:
        found: Rows = []
        with self._os_errors():
            self._update()
            while len(found) < limit:
                some = self._read(first + len(found), limit - len(found), self._cursor)
                if not some:
                    break
                found += some
            self._check_run()  # what was read may belong to a different run by now
        return [Row(row["seq"], row) for row in found]

    def total(self) -> int | None:
        with self._os_errors():
            self._update()
        return self._total

    def pick(self, seqs: Sequence[int]) -> Iterator[Row]:
        cursor, at = Cursor(), 0
        with self._os_errors():
            self._update()
            while at < len(seqs):
                first = seqs[at]
                last = seqs[bisect_left(seqs, first + _SPAN) - 1]
                found = self._read(first, last + 1 - first, cursor)
                if not found:
                    return
                self._check_run()
                end = bisect_left(seqs, first + len(found))
                for seq in seqs[at:end]:
                    yield Row(seq, found[seq - first])
                at = end

    async def changed(self, timeout_s: float) -> None:
        await self._watch.changed(timeout_s)

    def close(self) -> None:
        self._watch.close()

    @contextmanager
    def _os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SinkError(f"cannot read {error.filename or self._root}: {error.strerror}") from error

    def _update(self) -> None:
        """Read the manifest if it has changed.

        Raises:
            ConfigError: The run has an unknown format.
            SinkError: It is a different run, or its manifest is incomplete.
        """
        self._watch.add(self._root)
        self._watch.add(self._root / _KIND)
        self._check_run()
        path = self._root / "manifest.jsonl"
        try:
            status = path.stat()
        except FileNotFoundError:
            return
        seen = (status.st_ino, status.st_size, status.st_mtime_ns)
        if seen == self._manifest_file:
            return
        manifest = Manifest(path)
        self._shards = manifest.of_kind(_KIND)
        self._ends = [shard.last_seq for shard in self._shards]
        self._total = None
        if manifest.final is not None:
            self._total = self._sealed_rows
            if self._total != manifest.final.get(_KIND, self._total):
                raise SinkError(f"{path} does not list all shards of {_KIND}; run `streamsyn verify`")
        self._manifest_file = seen

    def _check_run(self) -> None:
        """Read run.json if it was replaced (each resume of a run writes it anew), and compare the run.

        Raises:
            ConfigError: The run has an unknown format.
            SinkError: It is a different run.
        """
        try:
            status = (self._root / "run.json").stat()
        except (FileNotFoundError, NotADirectoryError):
            if self._run_json and not self._is_gone:
                log.warning("stream.gone", directory=str(self._root), why="its run.json was there before")
            self._is_gone = bool(self._run_json)
            return
        self._is_gone = False
        seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if seen == self._run_json or (saved := read_run_json(self._root)) is None:
            return
        run = saved.get("created_at")
        if self._run_json and run != self._run:
            raise SinkError(f"{self._root} now holds a different run than before")
        self._run_json, self._run = seen, run

    @property
    def _sealed_rows(self) -> int:
        return self._ends[-1] + 1 if self._ends else 0

    def _read(self, seq: int, limit: int, cursor: "Cursor") -> Rows:
        """Rows from `seq` on from the shard that holds it; none if it has not been written yet."""
        if seq >= self._sealed_rows:
            return self._read_open(seq, limit, cursor)
        shard = self._shards[bisect_left(self._ends, seq)]
        if seq < shard.first_seq:
            self._refuse(shard.path, seq, shard.first_seq)
        self._move(cursor, shard.path, shard.first_seq, seq)
        limit = min(limit, shard.last_seq + 1 - seq)
        found, odd = read_rows(self._root / shard.path, cursor, seq, limit)
        if len(found) < limit:
            # The run may have been resumed since, and have written the shard with different frames.
            cursor.offset, cursor.seq = 0, shard.first_seq
            found, odd = read_rows(self._root / shard.path, cursor, seq, limit)
        if len(found) < limit:
            self._refuse(shard.path, seq + len(found), odd)
        return found

    def _read_open(self, seq: int, limit: int, cursor: "Cursor") -> Rows:
        for suffix in SUFFIXES.values():
            shard = f"{_KIND}/part-{len(self._shards):06d}{suffix}"
            for name in (shard + OPEN_SUFFIX, shard):  # it may have been sealed in between
                try:
                    return self._read_growing(self._root / name, shard, seq, limit, cursor)
                except FileNotFoundError:
                    continue
        return []

    def _read_growing(self, path: Path, shard: str, seq: int, limit: int, cursor: "Cursor") -> Rows:
        status = path.stat()
        self._move(cursor, shard, self._sealed_rows, seq)
        if status.st_size <= cursor.offset:
            return []
        found, odd = read_rows(path, cursor, seq, limit)
        scanned = (shard, status.st_size, status.st_mtime_ns)
        if found or (odd is None and ".zst" not in path.suffixes) or scanned == self._scanned:
            return found  # nothing, if the next row is not whole yet
        # The run may have been resumed, and have written different frames after what it cut off.
        self._scanned = scanned
        whole = Cursor(shard, 0, self._sealed_rows)
        found, odd = read_rows(path, whole, seq, limit)
        if found:
            cursor.offset, cursor.seq = whole.offset, whole.seq
        elif odd is not None:
            self._refuse(shard, seq, odd)
        return found

    @staticmethod
    def _move(cursor: "Cursor", shard: str, first_seq: int, seq: int) -> None:
        """Move the cursor into a shard, at or before a row."""
        if cursor.shard != shard or cursor.seq > seq:
            cursor.shard, cursor.offset, cursor.seq = shard, 0, first_seq

    def _refuse(self, shard: str, seq: int, odd: int | None) -> None:
        what = "is damaged or missing" if odd is None else f"is missing: row {odd} comes in its place"
        raise SinkError(f"{self._root / shard}: row {seq} {what}; run `streamsyn verify`")


@dataclass(slots=True)
class Cursor:
    """A position in a shard: the row `seq`, or the frame that begins with it, starts at byte `offset`."""

    shard: str = ""
    """The name of the shard once it is sealed."""
    offset: int = 0
    seq: int = 0


def read_rows(path: Path, cursor: Cursor, first: int, limit: int) -> tuple[Rows, int | None]:
    """Up to `limit` rows of a shard from row `first` on, as far as they are whole and without gaps.

    Moves the cursor, which must be at or before that row, to where the next call may start.

    Returns:
        The rows, and the seq of the row after a gap; None when there is no gap.
    """
    found: Rows = []
    for end, some in shards.scan(path, cursor.offset):
        for at, row in enumerate(some):
            if row.get("seq") != cursor.seq + at:
                return found, row.get("seq", -1)
        wanted = [row for row in some if row["seq"] >= first][: limit - len(found)]
        found += wanted
        if len(found) == limit and wanted and wanted[-1] is not some[-1]:
            break
        cursor.offset, cursor.seq = end, cursor.seq + len(some)
        if len(found) == limit:
            break
    return found, None


class FolderWatch:
    """Waits for changes in folders, with inotify where the kernel has it. Only a hint: NFS sends no
    notifications.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = -1
        if hasattr(self._libc, "inotify_init1"):
            self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._folders: set[Path] = set()

    def add(self, folder: Path) -> None:
        """Watch a folder, if it exists by now. May block."""
        if self._fd < 0 or folder in self._folders:
            return
        events = _MODIFY | _MOVED_TO | _CREATE
        if self._libc.inotify_add_watch(self._fd, os.fsencode(folder), events) >= 0:
            self._folders.add(folder)

    async def changed(self, timeout_s: float) -> None:
        """Return when something has changed since the last call, and after half a second at the latest."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        if self._fd >= 0:
            loop.add_reader(self._fd, changed.set)
        try:
            async with asyncio.timeout(min(timeout_s, _LOOK_EVERY_S)):
                await changed.wait()
            os.read(self._fd, 1 << 16)
        except TimeoutError:
            return
        finally:
            if self._fd >= 0:
                loop.remove_reader(self._fd)

    def close(self) -> None:
        """Stop watching."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
