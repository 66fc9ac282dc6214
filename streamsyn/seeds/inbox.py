"""The inbox of a run: seeds that are submitted while it runs, in OUT/spool/seeds.jsonl before it reads them.

What is submitted is on disk when `submit` returns. Concurrent calls share one fsync. The file holds all that
must survive: the entries, what requests with an idempotency key were answered, and whether the inbox is
closed. Seeds that were submitted before are found with an index that is derived from it (`inbox_index`).

After a kill at any moment, whole lines count as submitted, and a part of a line is cut off. A request that
was interrupted may have left some of its seeds: sent again, these are duplicates. The answer of a request
with an idempotency key is written together with the last of its seeds.
"""

import asyncio
import fcntl
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Condition, Lock
from typing import IO, Self, TypeAlias

import structlog

from streamsyn.config.sections import SeedsSection
from streamsyn.errors import DirectoryInUse, InboxClosed, KeyInUse, SinkError
from streamsyn.io.derived import SQLITE_ERRORS
from streamsyn.io.spool import BATCH_BYTES, BATCH_ENTRIES, Spool
from streamsyn.records import Entry
from streamsyn.seeds.inbox_index import Covered, InboxIndex
from streamsyn.seeds.inbox_lines import Closing, InboxLine, StoredAnswer, decode, encode, entry_key
from streamsyn.seeds.parse import SeedParser
from streamsyn.seeds.submission import Submission, Submitted

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


class Inbox:
    """Takes seeds from any thread, and hands them to the run that reads them.

    All calls block on the disk, `room` and the properties aside: call them in a thread. The first call opens
    the files. After `release`, which closes them, only `open` does: whoever is late is refused.

    Args:
        out: The run directory.
        seeds: The section of the configuration: names of fields, longest line.
        takes_documents: Whether a seed is a document instead of a pair.
    """

    def __init__(self, out: Path, seeds: SeedsSection, *, takes_documents: bool = False) -> None:
        self.path = out / "spool" / "seeds.jsonl"
        self._max_line_bytes = seeds.max_line_bytes
        self._parser = SeedParser(seeds.fields, form=seeds.format, takes_documents=takes_documents)
        self._spool: Spool[_Sized] = Spool(self.path, _decode_sized)
        self._index = InboxIndex(out / "index" / "inbox.sqlite")
        self._lock: IO[bytes] | None = None
        self._writing = Lock()
        self._mutex = Lock()
        self._waiting: list[_Part] = []
        self._keys_in_use: set[str] = set()
        self._changed = Condition()
        self._covered = Covered()
        self._is_stale = True
        self._is_released = False
        self._room: list[tuple[int, asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def accepted(self) -> int:
        """Number of entries in the file, all in all."""
        return self._covered.accepted

    @property
    def unread(self) -> int:
        """Number of entries that wait to be read by the run."""
        return self._covered.accepted - self._covered.taken

    @property
    def closed(self) -> bool:
        """Whether no more seeds are taken."""
        return self._covered.closed

    def exists(self) -> bool:
        """Whether anything was ever submitted to the run."""
        return self.path.exists()

    def open(self) -> None:
        """Open the files, and read what the index lacks after a kill.

        Raises:
            SinkError: They cannot be used, or a line is damaged that is not among the last ones.
            DirectoryInUse: A different process has the inbox open.
        """
        with self._writing:
            self._is_released = False
            self._open()

    def release(self) -> None:
        """Close the files. Calls from now on raise InboxClosed, until `open` is called."""
        with self._writing:
            self._is_released = True
            with suppress(*SQLITE_ERRORS, OSError):  # derived: what is not saved is found again
                if not self._is_stale:
                    self._index.write(self._covered)
                self._index.forget()
            self._is_stale = True
            self._spool.close()
            if self._lock is not None:
                self._lock.close()
                self._lock = None
        self.wake()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def submit(self, rows: Iterable[object], key: str | None = None) -> Submitted:
        """Take seeds, which are on disk on return.

        Args:
            rows: Each a line of JSON as bytes or text, or a decoded one.
            key: An idempotency key: the same rows with the same key again give the same answer.

        Raises:
            InboxClosed: The inbox is closed.
            KeyInUse: A call with the same key has not ended yet.
            KeyReused: The key belongs to different rows.
            SinkError: They cannot be written.
        """
        with self.submission(key) as submission:
            for row in rows:
                submission.add(row)
            return submission.finish()

    @contextmanager
    def submission(
        self, key: str | None = None, *, keeps_bad: bool = False, max_line_bytes: int | None = None
    ) -> Iterator[Submission]:
        """A request whose lines come in pieces; on disk is what `flush` or `finish` has returned for.

        Args:
            key: Its idempotency key, if it has one.
            keeps_bad: Keep bad lines as entries, which become rejects, instead of refusing them.
            max_line_bytes: The longest line, if it is shorter than `seeds.max_line_bytes`.

        Raises:
            InboxClosed, KeyInUse, SinkError: As `submit`.
        """
        with self._mutex:
            if key is not None and key in self._keys_in_use:
                raise KeyInUse(f"a request with the idempotency key {key!r} is being received; wait for it")
            if key is not None:
                self._keys_in_use.add(key)
        try:
            yield Submission(
                self._append,
                self._parser,
                min(self._max_line_bytes, max_line_bytes or self._max_line_bytes),
                key,
                self._answer(key),
                keeps_bad=keeps_bad,
            )
        finally:
            with self._mutex:
                self._keys_in_use.discard(key or "")

    def close(self) -> None:
        """Take no more seeds: a run that reads the inbox ends when it has read all.

        Raises:
            SinkError: It cannot be written.
        """
        self._set_closed(True)

    def reopen(self) -> None:
        """Take seeds again.

        Raises:
            SinkError: It cannot be written.
        """
        self._set_closed(False)

    async def room(self, limit: int) -> None:
        """Wait until at most `limit` entries are unread, or `wake` is called."""
        with self._changed:
            if self.unread <= limit:
                return
            loop = asyncio.get_running_loop()
            waiter = loop.create_future()
            self._room.append((limit, loop, waiter))
        await waiter

    def wait_for_room(self, limit: int, is_over: Callable[[], bool] = lambda: False) -> None:
        """Wait as `room` does, in a thread; `wake` ends the wait if `is_over` returns True."""
        with self._changed:
            self._changed.wait_for(lambda: self.unread <= limit or self.closed or is_over())

    def wake(self) -> None:
        """End all waits for room: seeds are no longer taken, for example."""
        with self._changed:
            self._changed.notify_all()
            self._wake(lambda _: True)

    def entries(self, reading: "InboxSource") -> Iterator[list[Entry]]:
        """All entries from the beginning, in batches; `reading` says whether and when to stop waiting.

        Raises:
            SinkError: A line is damaged, or the file cannot be read.
        """
        with self._writing:
            self._open()
        position = number = read = 0
        try:
            with self.path.open("rb") as file:
                while (end := self._beyond(position, reading)) is not None:
                    batch: list[Entry] = []
                    begin = position
                    while position < end and len(batch) < BATCH_ENTRIES and position - begin < BATCH_BYTES:
                        line = file.readline()
                        number += 1
                        position += len(line)
                        found = decode(line, number)
                        if found is None:
                            raise SinkError(f"{self.path}:{number} is damaged; repair or delete that line")
                        if not isinstance(found, StoredAnswer | Closing):
                            batch.append(found)
                    read += len(batch)
                    self._took(read)
                    if batch:
                        yield batch
        except OSError as error:
            raise SinkError(f"cannot read {self.path}: {error.strerror}") from error

    def stop(self, reading: "InboxSource") -> None:
        """End the wait of a reader."""
        with self._changed:
            reading.stopped = True
            self._changed.notify_all()

    def _beyond(self, position: int, reading: "InboxSource") -> int | None:
        """Wait until the file is longer than `position`; its length, or None if it is read to its end."""
        with self._changed:
            while not reading.stopped:
                if self._covered.end > position:
                    return self._covered.end
                if self._covered.closed or not reading.waits:
                    return None
                self._changed.wait()
        return None

    def _took(self, read: int) -> None:
        with self._changed:
            self._covered.taken = max(self._covered.taken, read)
            self._changed.notify_all()
            if self._room:
                self._wake(lambda limit: self.unread <= limit)

    def _wake(self, may_go: Callable[[int], bool]) -> None:
        staying = []
        for limit, loop, waiter in self._room:
            if may_go(limit):
                with suppress(RuntimeError):  # its loop has ended
                    loop.call_soon_threadsafe(_release, waiter)
            else:
                staying.append((limit, loop, waiter))
        self._room = staying

    def _set_closed(self, closed: bool) -> None:
        with self._writing:
            self._open()
        if self._covered.closed != closed:
            self._write_part(_Part((), lambda _: Closing(closed)))

    def _append(self, entries: Sequence[Entry], answer: Callable[[int], StoredAnswer] | None = None) -> int:
        """Write entries, and behind them the answer if there is one; the number of new ones."""
        part = _Part([(entry_key(entry), entry) for entry in entries], answer)
        self._write_part(part)
        return part.accepted

    def _answer(self, key: str | None) -> StoredAnswer | None:
        """The answer of an earlier request with the key."""
        if key is None:
            return None
        with self._writing, self._translated():
            self._open()
            stored = self._index.answer(key)
        return None if stored is None else StoredAnswer(key, *stored)

    def _write_part(self, part: _Part) -> None:
        """Write a part together with all that wait at the time."""
        with self._mutex:
            self._waiting.append(part)
        with self._writing:
            if not part.done:  # by a different thread, while this one waited
                with self._mutex:
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
        group = _Group(replace(self._covered))
        for part in parts:
            self._add(part, group)
        if group.data:
            self._spool.append(b"".join(group.data))
        with self._changed:
            group.covered.taken = self._covered.taken  # a reader may have gone on
            self._covered = group.covered
            self._changed.notify_all()
            if self._covered.closed:
                self._wake(lambda _: True)
        try:
            self._index.keep(self._covered)
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
            elif self.path.stat().st_size > self._covered.end:
                self._spool.cut(self._covered.end)  # what a failed `append` left behind
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
        covered, taken = self._index.covered(), self._covered.taken
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
        with self._changed:
            covered.taken = max(covered.taken, taken)
            self._covered = covered
            self._changed.notify_all()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn an error of SQLite or of the disk into a SinkError that says what to do."""
        try:
            yield
        except (*SQLITE_ERRORS, OSError) as error:
            raise SinkError(f"cannot use {self._index.path}: {error}; make room and try again") from error


class InboxSource:
    """The entries of an inbox, for one run; `stop` ends a read that waits for more.

    Args:
        inbox: The inbox.
        waits: Whether to wait for more until the inbox is closed; if not, the end of the file is the end.

    Attributes:
        stopped: Whether `stop` was called.
    """

    def __init__(self, inbox: Inbox, *, waits: bool = True) -> None:
        self.waits = waits
        self.stopped = False
        self._inbox = inbox

    def batches(self) -> Iterator[list[Entry]]:
        return self._inbox.entries(self)

    def fraction(self) -> float | None:
        return None

    def stop(self) -> None:
        """End `batches`, from any thread."""
        self._inbox.stop(self)


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


def _release(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
