"""The inbox of a run: seeds that are submitted while it runs, in OUT/spool/seeds.jsonl before it reads them.

What is submitted is on disk when `submit` returns. A request that was interrupted, by a kill or by its
client, may have left some of its seeds: sent again, these are duplicates. The answer of a request with an
idempotency key is written together with the last of its seeds.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from streamsyn.config.sections import SeedsSection
from streamsyn.errors import KeyInUse, SinkError
from streamsyn.io.spool import BATCH_BYTES, BATCH_ENTRIES
from streamsyn.records import Entry
from streamsyn.seeds.inbox_file import Fence, InboxFile
from streamsyn.seeds.inbox_lines import Closing, StoredAnswer, decode
from streamsyn.seeds.parse import SeedParser
from streamsyn.seeds.submission import Submission, Submitted


class Inbox:
    """Takes seeds from any thread, and hands them to the run that reads them.

    All calls block on the disk, `room` and the properties aside: call them in a thread. The first call opens
    the files. After `release`, which closes them, only `open` does: whoever is late is refused.

    Args:
        out: The run directory.
        seeds: The section of the configuration: names of fields, longest line.
        takes_documents: Whether a seed is a document instead of a pair.
        fence: Refuses what a newer process would not read, as `InboxFile` describes.
    """

    def __init__(
        self,
        out: Path,
        seeds: SeedsSection,
        *,
        takes_documents: bool = False,
        fence: Fence | None = None,
    ) -> None:
        self._max_line_bytes = seeds.max_line_bytes
        self._parser = SeedParser(seeds.fields, form=seeds.format, takes_documents=takes_documents)
        self._file = InboxFile(out, fence)
        self._changed = self._file.changed
        self._keys_in_use: set[str] = set()
        self._room: list[tuple[int, asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    @property
    def accepted(self) -> int:
        """Number of entries in the file, all in all."""
        return self._file.covered.accepted

    @property
    def unread(self) -> int:
        """Number of entries that wait to be read by the run."""
        covered = self._file.covered
        return covered.accepted - covered.taken

    @property
    def closed(self) -> bool:
        """Whether no more seeds are taken."""
        return self._file.covered.closed

    def exists(self) -> bool:
        """Whether anything was ever submitted to the run."""
        return self.path.exists()

    def open(self) -> None:
        """Open the files, and read what the index lacks after a kill.

        Raises:
            SinkError: They cannot be used, or a line is damaged that is not among the last ones.
            DirectoryInUse: A different process has the inbox open.
        """
        self._file.open()

    def release(self) -> None:
        """Close the files. Calls from now on raise InboxClosed, until `open` is called."""
        self._file.release()
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
        with self._changed:
            if key is not None and key in self._keys_in_use:
                raise KeyInUse(f"a request with the idempotency key {key!r} is being received; wait for it")
            if key is not None:
                self._keys_in_use.add(key)
        try:
            yield Submission(
                self._file.append,
                self._parser,
                min(self._max_line_bytes, max_line_bytes or self._max_line_bytes),
                key,
                None if key is None else self._file.answer(key),
                keeps_bad=keeps_bad,
            )
        finally:
            with self._changed:
                self._keys_in_use.discard(key or "")

    def close(self) -> None:
        """Take no more seeds: a run that reads the inbox ends when it has read all.

        Raises:
            SinkError: It cannot be written.
        """
        self._file.set_closed(True)
        self.wake()

    def reopen(self) -> None:
        """Take seeds again.

        Raises:
            SinkError: It cannot be written.
        """
        self._file.set_closed(False)

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
        self._file.open_unless_released()
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
                if self._file.covered.end > position:
                    return self._file.covered.end
                if self._file.covered.closed or not reading.waits:
                    return None
                self._changed.wait()
        return None

    def _took(self, read: int) -> None:
        with self._changed:
            self._file.covered.taken = max(self._file.covered.taken, read)
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


def _release(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
