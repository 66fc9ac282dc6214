"""The file of an inbox, OUT/spool/seeds.jsonl, with its index: written by any thread, one sync for many.

The file holds all that must survive: the entries, what requests with an idempotency key were answered, and
whether the inbox is closed. The index is derived from it. After a kill at any moment, whole lines count, and
a part of a line is cut off.
"""

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Condition, Lock
from typing import IO, TypeAlias

import structlog

from streamsyn.errors import DirectoryInUse, InboxClosed, SinkError
from streamsyn.io.derived import SQLITE_ERRORS
from streamsyn.io.spool import Spool
from streamsyn.records import Entry
from streamsyn.seeds.inbox_index import Covered, InboxIndex
from streamsyn.seeds.inbox_lines import Closing, InboxLine, StoredAnswer, decode, encode, entry_key

log = structlog.get_logger()

_Sized: TypeAlias = tuple[InboxLine, int]


@dataclass(slots=True)
class _Part:
    """Lines that are written together, for the thread that waits for them.

    Attributes:
        lines: Entries, each with its key.
        last: Makes the line behind them from the number of new entries; None for none.
    """

    lines: Sequence[tuple[bytes, Entry]]
    last: Callable[[int], StoredAnswer | Closing] | None = None
    accepted: int = 0
    error: Exception | None = None
    done: bool = False


@dataclass(slots=True)
class _Group:
    """What several parts add to the file and to the counts."""

    covered: Covered
    data: list[bytes] = field(default_factory=list)

    def add(self, line: InboxLine) -> None:
        encoded = encode(line)
        self.data.append(encoded)
        self.covered.end += len(encoded)
        self.covered.lines += 1


class InboxFile:
    """Appends to the file. Any thread may call; all calls block on the disk.

    The first call opens the files. After `release`, only `open` does: whoever is late is refused.

    Args:
        out: The run directory.

    Attributes:
        path: The file.
        covered: What the file holds; replaced when that changes.
        changed: Held to change `covered`, and notified of it.

    Raises:
        SinkError: By all calls: the files cannot be used, or a line is damaged that is not among the last.
        DirectoryInUse: By all calls: a different process has the file open.
        InboxClosed: By all calls but `open`: the file was released.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / "spool" / "seeds.jsonl"
        self.covered = Covered()
        self.changed = Condition()
        self._spool: Spool[_Sized] = Spool(self.path, _decode_sized)
        self._index = InboxIndex(out / "index" / "inbox.sqlite")
        self._lock: IO[bytes] | None = None
        self._writing = Lock()
        self._gathering = Lock()
        self._waiting: list[_Part] = []
        self._is_stale = True
        self._is_released = False

    def open(self) -> None:
        """Open the files, and read what the index lacks after a kill."""
        with self._writing:
            self._is_released = False
            self._open()

    def open_unless_released(self) -> None:
        """Open the files, if that was not done yet."""
        with self._writing:
            self._open()

    def release(self) -> None:
        """Close the files."""
        with self._writing:
            self._is_released = True
            with suppress(*SQLITE_ERRORS, OSError):  # derived: what is not saved is found again
                if not self._is_stale:
                    self._index.write(self.covered)
                self._index.forget()
            self._is_stale = True
            self._spool.close()
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def append(self, entries: Sequence[Entry], answer: Callable[[int], StoredAnswer] | None = None) -> int:
        """Write entries that are new, and behind them the answer if there is one.

        Returns:
            The number of new entries.

        Raises:
            InboxClosed: The inbox is closed.
        """
        part = _Part([(entry_key(entry), entry) for entry in entries], answer)
        self._write_part(part)
        return part.accepted

    def set_closed(self, closed: bool) -> None:
        """Close or reopen the inbox, if it is not in that state already."""
        self.open_unless_released()
        if self.covered.closed != closed:
            self._write_part(_Part((), lambda _: Closing(closed)))

    def answer(self, key: str) -> StoredAnswer | None:
        """The answer of an earlier request with an idempotency key."""
        with self._writing, self._translated():
            self._open()
            stored = self._index.answer(key)
        return None if stored is None else StoredAnswer(key, *stored)

    def _write_part(self, part: _Part) -> None:
        """Write a part together with all that wait at the time."""
        with self._gathering:
            self._waiting.append(part)
        with self._writing:
            if not part.done:  # by a different thread, while this one waited
                with self._gathering:
                    group, self._waiting = self._waiting, []
                self._write(group)
        if part.error is not None:
            raise part.error

    def _write(self, parts: list[_Part]) -> None:
        error: Exception | None = None
        try:
            with self._translated():
                self._open()
                try:
                    self._store(parts)
                except SQLITE_ERRORS as damage:
                    self._rebuild(damage)
                    self._store(parts)
        except (SinkError, DirectoryInUse, InboxClosed) as raised:
            self._is_stale = True
            error = raised
        except BaseException:
            self._is_stale = True
            error = SinkError(f"{self.path}: the writing of seeds was interrupted")
            raise
        finally:
            for part in parts:
                part.error, part.done = part.error or error, True

    def _store(self, parts: list[_Part]) -> None:
        """Write the new lines of all parts with one fsync; then the index may keep their keys."""
        group = _Group(replace(self.covered))
        for part in parts:
            self._add(part, group)
        if group.data:
            self._spool.append(b"".join(group.data))
        with self.changed:
            group.covered.taken = self.covered.taken  # a reader may have gone on
            self.covered = group.covered
            self.changed.notify_all()
        try:
            self._index.keep(self.covered)
        except (*SQLITE_ERRORS, OSError) as error:  # the file has them: the index reads them again
            self._is_stale = True
            log.warning("inbox.index_behind", path=str(self._index.path), why=str(error))

    def _add(self, part: _Part, group: _Group) -> None:
        part.accepted, part.error = 0, None
        if group.covered.closed and part.lines:
            part.error = InboxClosed("the run takes no more seeds: it was closed")
            return
        new = self._index.add([key for key, _ in part.lines])
        for key, entry in part.lines:
            if key in new:
                new.discard(key)
                part.accepted += 1
                group.add(entry)
        group.covered.accepted += part.accepted
        if part.last is None:
            return
        last = part.last(part.accepted)
        if isinstance(last, Closing):
            group.covered.closed = last.closed
        else:
            self._index.add_answer(last.key, last.body, last.answer)
        group.add(last)

    def _open(self) -> None:
        if not self._is_stale:
            return
        if self._is_released:
            raise InboxClosed("the run takes no more seeds: it has ended")
        with self._translated():
            self._index.forget()
            if self._lock is None:
                self._spool.open()
                self._lock = _locked(self.path)
            elif self.path.stat().st_size > self.covered.end:
                self._spool.cut(self.covered.end)  # what a failed `append` left behind
            try:
                self._catch_up()
            except SQLITE_ERRORS as damage:
                self._rebuild(damage)
        self._is_stale = False

    def _rebuild(self, damage: Exception) -> None:
        self._index.discard(damage)
        log.warning("index.rebuilt", path=str(self._index.path), why=str(damage))
        self._catch_up()

    def _catch_up(self) -> None:
        """Read what the index does not cover: all of the file, if the index is new."""
        covered, taken = self._index.covered(), self.covered.taken
        if self.path.stat().st_size < covered.end:
            self._index.delete()
            covered = Covered()
        for batch in self._spool.replay(covered.end, covered.lines):
            entries = []
            for line, size in batch:
                covered.end += size
                covered.lines += 1
                match line:
                    case Closing():
                        covered.closed = line.closed
                    case StoredAnswer():
                        self._index.add_answer(line.key, line.body, line.answer)
                    case _:
                        entries.append(entry_key(line))
            covered.accepted += len(entries)
            self._index.add(entries)
            self._index.keep(covered)
        with self.changed:
            covered.taken = max(covered.taken, taken)
            self.covered = covered
            self.changed.notify_all()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn an error of SQLite or of the disk into a SinkError that says what to do."""
        try:
            yield
        except (*SQLITE_ERRORS, OSError) as error:
            raise SinkError(f"cannot use {self._index.path}: {error}; make room and try again") from error


def _decode_sized(line: bytes) -> _Sized | None:
    found = decode(line)
    return None if found is None else (found, len(line))


def _locked(path: Path) -> IO[bytes]:
    """The file, open and locked against other processes."""
    file = path.open("rb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise DirectoryInUse(f"{path} is in use by another process") from None
    return file
