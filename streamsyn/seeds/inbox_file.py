"""The file of an inbox, OUT/spool/seeds.jsonl, with its index: written by any thread, one sync for many.

The file holds all that must survive: the entries, what requests with an idempotency key were answered, and
whether the inbox is closed. The index is derived from it. After a kill at any moment, whole lines count, and
a part of a line is cut off.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from threading import Condition, Lock
from typing import IO, Final, Protocol, TypeAlias

import structlog

from streamsyn.errors import DirectoryInUse, InboxClosed, SinkError, TakenOver
from streamsyn.io.derived import SQLITE_ERRORS, DerivedDatabase
from streamsyn.io.durable import sync_folder
from streamsyn.io.spool import Spool
from streamsyn.records import Entry
from streamsyn.seeds.inbox_lines import Closing, InboxLine, StoredAnswer, decode, encode, entry_key

log = structlog.get_logger()

_KEYS_A_QUERY: Final = 500
_BUSY_TIMEOUT_S: Final = 60.0
_IN_MEMORY: Final = 32_768
"""About 4 MB."""
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS seeds (key BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, body BLOB, answer BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS covered (name TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID;
"""
_Sized: TypeAlias = tuple[InboxLine, int]


@dataclass(slots=True)
class Covered:
    """What an index covers of the file.

    Attributes:
        end: The offset behind the last line, in bytes.
        lines: Number of lines.
        accepted: Number of entries among them.
        taken: Number of entries that a run has read.
        closed: Whether the inbox is closed.
    """

    end: int = 0
    lines: int = 0
    accepted: int = 0
    taken: int = 0
    closed: bool = False


class InboxIndex:
    """The keys and answers of an inbox, derived from its file. For one thread at a time.

    The last keys are in memory alone, and are written together, in the order of the keys: one by one, each
    would change a page of its own. So after a kill the SQLite file covers the inbox up to an offset, behind
    which its lines are read again; it never has a key too many.

    Calls may raise `SQLITE_ERRORS` and OSError. Changes are provisional until `keep`: `forget`, and then
    reading what is behind `covered` again, undoes them.

    Args:
        path: The SQLite file.
        in_memory: Number of keys that are held in memory before they are written.
    """

    def __init__(self, path: Path, in_memory: int = _IN_MEMORY) -> None:
        self.path = path
        self._file = DerivedDatabase(path, _TABLES, busy_timeout_s=_BUSY_TIMEOUT_S)
        self._in_memory = in_memory
        self._keys: set[bytes] = set()
        self._answers: dict[str, tuple[bytes, bytes]] = {}

    def covered(self) -> Covered:
        """What the file covers."""
        found = dict(self._file.connect().execute("SELECT name, value FROM covered"))
        end, lines, accepted, taken, closed = (int(found.get(field.name, 0)) for field in fields(Covered))
        return Covered(end, lines, accepted, taken, bool(closed))

    def add(self, keys: Sequence[bytes]) -> set[bytes]:
        """Add the keys of seeds, and return those that are new."""
        new = set(keys) - self._keys
        unknown, db = list(new), self._file.connect()
        for start in range(0, len(unknown), _KEYS_A_QUERY):
            some = unknown[start : start + _KEYS_A_QUERY]
            query = f"SELECT key FROM seeds WHERE key IN ({','.join('?' * len(some))})"  # noqa: S608
            new.difference_update(key for (key,) in db.execute(query, some))
        self._keys |= new
        return new

    def add_answer(self, key: str, body: bytes, answer: bytes) -> None:
        """Add what the request with an idempotency key was answered; `body` is the hash of its content."""
        self._answers.setdefault(key, (body, answer))

    def answer(self, key: str) -> tuple[bytes, bytes] | None:
        """The hash of the content, and the answer, of the request with an idempotency key."""
        if key in self._answers:
            return self._answers[key]
        query = "SELECT body, answer FROM answers WHERE key = ?"
        row: tuple[bytes, bytes] | None = self._file.connect().execute(query, (key,)).fetchone()
        return row

    def keep(self, covered: Covered) -> None:
        """What was added is on disk in the inbox, up to `covered`."""
        if len(self._keys) + len(self._answers) >= self._in_memory:
            self.write(covered)

    def write(self, covered: Covered) -> None:
        """Write what is in memory alone: the file then covers the inbox up to `covered`."""
        db = self._file.connect()
        with db:  # rolls back when it cannot be written
            db.execute("BEGIN")
            db.executemany("INSERT OR IGNORE INTO seeds VALUES (?)", ((key,) for key in sorted(self._keys)))
            answers = ((key, *answer) for key, answer in self._answers.items())
            db.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", answers)
            rows = [(field.name, int(getattr(covered, field.name))) for field in fields(Covered)]
            db.executemany("INSERT OR REPLACE INTO covered VALUES (?, ?)", rows)
        self._keys.clear()
        self._answers.clear()

    def forget(self) -> None:
        """Drop what is in memory alone, and close the file; the next call opens it again."""
        self._keys.clear()
        self._answers.clear()
        self._file.close()

    def delete(self) -> None:
        """Delete the file and drop what is in memory."""
        self.forget()
        self._file.delete()

    def discard(self, error: Exception) -> None:
        """Delete everything if `error` means that the file is damaged.

        Raises:
            Exception: `error` itself, if the disk or the permissions are at fault.
        """
        self.forget()
        self._file.discard(error)


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


class Fence(Protocol):
    """Which of several processes may write: `streamsyn.sink.epoch.Epoch`."""

    took_over: bool
    """Whether an older process may be alive."""

    def check(self) -> None:
        """Raise TakenOver if a newer process may."""
        ...


class InboxFile:
    """Appends to the file. Any thread may call; all calls block on the disk.

    The first call opens the files. After `release`, only `open` does: whoever is late is refused.

    Args:
        out: The run directory.
        fence: Keeps what an older process writes late out of the file: whoever took over goes on with a
            copy. What is acknowledged is checked once it is on disk, so it is in the copy.

    Attributes:
        path: The file.
        covered: What the file holds; replaced when that changes.
        changed: Held to change `covered`, and notified of it.

    Raises:
        SinkError: By all calls: the files cannot be used, or a line is damaged that is not among the last.
        DirectoryInUse: By all calls: a different process has the file open.
        InboxClosed: By all calls but `open`: the file was released.
        TakenOver: By all calls: a newer process has it.
    """

    def __init__(self, out: Path, fence: Fence | None = None) -> None:
        self._fence = fence
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
            with suppress(*SQLITE_ERRORS, OSError, TakenOver):  # derived: what is not saved is found again
                if not self._is_stale:
                    self._check()
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
        except (SinkError, DirectoryInUse, InboxClosed, TakenOver) as raised:
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
        self._check()
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
        self._check()
        with self._translated():
            self._index.forget()
            if self._lock is None:
                self._leave_old_file()
                self._spool.open()
                self._lock = _locked(self.path)
            elif self.path.stat().st_size > self.covered.end:
                self._spool.cut(self.covered.end)  # what a failed `append` left behind
            try:
                self._catch_up()
            except SQLITE_ERRORS as damage:
                self._rebuild(damage)
        self._is_stale = False

    def _check(self) -> None:
        if self._fence is not None:
            self._fence.check()

    def _leave_old_file(self) -> None:
        """Go on with a copy of the file, and a new index, if an older process may have them open."""
        if self._fence is None or not self._fence.took_over or not self.path.exists():
            return
        aside = self.path.with_name(f"{self.path.name}.new")
        with self.path.open("rb") as source, aside.open("wb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
        self._check()
        aside.replace(self.path)
        sync_folder(self.path.parent)
        self._index.delete()

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
