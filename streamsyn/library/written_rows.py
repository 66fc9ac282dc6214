"""The rows of a run directory as asynchronous iterators, while a run in a different thread writes them.

`ReadAhead` limits how many samples the run writes before its reader asks for them (backpressure).
"""

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from streamsyn.errors import SinkError
from streamsyn.following.run_rows import RunRows
from streamsyn.following.shard_lines import Cursor

_BATCH: Final = 64
"""Rows read at once."""


class ReadAhead:
    """Holds up assembly while `limit` samples are written that nobody has asked for.

    See `pipeline.delivery.SampleGate`. All methods are for any thread.

    Args:
        limit: Maximum number of such samples; what assembly writes at once may exceed it.
        asked: Number of samples, from the first of the directory, that need not be asked for.
    """

    def __init__(self, limit: int, asked: int = 0) -> None:
        self._limit = limit
        self._asked = asked
        self._is_lifted = False
        self._changed = threading.Condition()

    def ask(self, samples: int) -> None:
        """The first `samples` samples of the run directory have been asked for."""
        with self._changed:
            self._asked = max(self._asked, samples)
            self._changed.notify_all()

    def written(self, samples: int) -> None:
        """Return when fewer than `limit` of the `samples` samples of the directory wait to be asked for."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_lifted or samples - self._asked < self._limit)

    def stop(self) -> None:
        """Hold up nothing any more."""
        with self._changed:
            self._is_lifted = True
            self._changed.notify_all()


class Written:
    """How many rows of each kind the run has written, and whether it has ended.

    `rows` and `end` are called by the threads of the run, all else in the event loop of whoever reads.

    Args:
        kinds: The kinds of rows.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self._numbers = dict.fromkeys(kinds, -1)
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._ends = False
        self._is_waking = False
        """Whether `_wake` is scheduled: a loop that stands still must not gather calls."""
        self.ended = False

    def __getitem__(self, kind: str) -> int:
        """Number of rows of a kind."""
        return max(0, self._numbers[kind])

    @property
    def is_open(self) -> bool:
        """Whether the log is open: its rows have been counted."""
        return min(self._numbers.values()) >= 0

    def rows(self, kind: str, number: int) -> None:
        """The log has `number` rows of a kind by now, to be read."""
        self._numbers[kind] = number
        self._schedule()

    def end(self) -> None:
        """No more rows are written."""
        self._ends = True
        self._schedule()

    async def change(self) -> None:
        """Wait until there are more rows, or the end."""
        await self._changed.wait()

    def _schedule(self) -> None:
        if self._is_waking:
            return
        self._is_waking = True
        with suppress(RuntimeError):  # the loop of the reader is closed: nobody reads
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_waking = False  # before the waiters look
        self.ended = self._ends  # here, so that whoever looks in this loop has seen the last rows
        self._changed.set()
        self._changed = asyncio.Event()


class WrittenRows:
    """The rows of one kind from row `first` on, to the end of the run.

    A cancelled `next` loses no row. Several asyncio tasks may call it: each row goes to one of them.

    Args:
        root: The run directory.
        kind: `samples`, `contexts` or `rejects`.
        first: The seq of the first row.
        written: Tells how many rows there are.
    """

    def __init__(self, root: Path, kind: str, first: int, written: Written) -> None:
        self._kind = kind
        self._written = written
        self._read = RunRows(root, kind)
        self._cursor = Cursor()
        self._ready: deque[dict[str, Any]] = deque()
        self._reading = asyncio.Lock()
        self.position = first
        """The seq of the row that is handed out next."""

    @property
    def is_behind(self) -> bool:
        """Whether the next row is written."""
        return self.position < self._written[self._kind]

    async def next(self) -> dict[str, Any] | None:
        """The next row, once it is written; None if the run ends before.

        Raises:
            SinkError: The log cannot be read.
        """
        async with self._reading:
            while not self._ready:
                if self.is_behind:
                    await self._fill()
                elif self._written.ended:
                    return None
                else:
                    await self._written.change()
            self.position += 1
            return self._ready.popleft()

    async def head(self) -> dict[str, Any]:
        """The next row, which is written, without taking it.

        Raises:
            SinkError: The log cannot be read.
        """
        if not self._ready:
            await self._fill()
        return self._ready[0]

    async def _fill(self) -> None:
        # A read that is abandoned by a cancellation goes on in its thread: it has a cursor of its own.
        cursor = replace(self._cursor)
        limit = min(_BATCH, self._written[self._kind] - self.position)
        rows = await asyncio.to_thread(self._read.rows, self.position, limit, cursor=cursor)
        if not rows:
            raise SinkError(f"row {self.position} of {self._read.root / self._kind} cannot be read")
        self._ready.extend(rows)
        self._cursor = cursor
