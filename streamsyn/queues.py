"""What stands between two stages. Both kinds make an earlier stage wait for a slow later one (backpressure).

A full `BoundedQueue` makes the stage that puts wait. A full `Backlog` never does: what is there goes through
at once, and nothing new is begun instead.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, Self, TypeVar

from streamsyn.errors import StoppedEarly

T = TypeVar("T")


class _Queue(Generic[T]):
    """A FIFO, closed by the stage that puts. Read it with `async for`.

    `close` does not wait, so a done-callback can call it: the queue is closed even when the putting stage was
    cancelled before its first step. Readers get the remaining items, then the iteration ends.

    Raises:
        ValueError: `maxsize` is below 1.
    """

    def __init__(self, maxsize: int) -> None:
        if maxsize < 1:
            raise ValueError(f"maxsize must be at least 1, not {maxsize}")
        self.maxsize = maxsize
        self._items: deque[T] = deque()
        self._readers: deque[asyncio.Future[None]] = deque()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called; items may be left."""
        return self._closed

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<{type(self).__name__} {len(self._items)}/{self.maxsize} {state}>"

    def get_nowait(self, limit: int) -> list[T]:
        """Remove and return at most `limit` items without waiting; possibly none."""
        return [self._pop() for _ in range(min(limit, len(self._items)))]

    def close(self) -> None:
        """Mark the end: nothing more will be put. May be called more than once."""
        self._closed = True
        _wake_all(self._readers)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while not self._items:
            if self._closed:
                raise StopAsyncIteration
            await _wait_to_be_woken(self._readers, lambda: bool(self._items))
        return self._pop()

    def _add(self, item: T) -> None:
        if self._closed:
            raise RuntimeError("put on a closed queue")
        self._items.append(item)
        _wake_one(self._readers)

    def _pop(self) -> T:
        return self._items.popleft()


class BoundedQueue(_Queue[T]):
    """A queue of at most `maxsize` items."""

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize)
        self._writers: deque[asyncio.Future[None]] = deque()

    async def put(self, item: T) -> None:
        """Wait until the queue is not full, then add `item`.

        Raises:
            RuntimeError: The queue is closed; only the stage that puts may close it.
        """
        while len(self._items) >= self.maxsize and not self._closed:
            await _wait_to_be_woken(self._writers, lambda: len(self._items) < self.maxsize)
        self._add(item)

    def discard(self) -> int:
        """Remove all items and return their number. Used by a drain, which starts nothing new."""
        dropped = len(self._items)
        while self._items:
            self._pop()
        return dropped

    def close(self) -> None:
        """Mark the end: nothing more will be put. May be called more than once."""
        super().close()
        _wake_all(self._writers)

    def _pop(self) -> T:
        item = super()._pop()
        _wake_one(self._writers)
        return item


class Backlog(_Queue[T]):
    """A queue that takes every item at once, and counts each until `done` is called, long after it was read.

    While `maxsize` items are not done, `room` waits. So workers that await it before they begin something new
    add at most one item each beyond `maxsize`.

    Attributes:
        on_change: Called at once when an item was put, and at the end. So a reader in a different thread,
            which takes items with `get_nowait`, need not wait for the event loop.
    """

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize)
        self.on_change: Callable[[], None] = lambda: None
        self._not_done = 0
        self._may_begin = asyncio.Event()
        self._may_begin.set()
        self._is_draining = False

    @property
    def not_done(self) -> int:
        """Number of items that were put and are not done."""
        return self._not_done

    def put(self, item: T) -> None:
        """Add `item`.

        Raises:
            RuntimeError: The queue is closed; only the stage that puts may close it.
        """
        self._add(item)
        self._not_done += 1
        if self._not_done >= self.maxsize and not self._is_draining:
            self._may_begin.clear()
        self.on_change()

    def close(self) -> None:
        """Mark the end: nothing more will be put. May be called more than once."""
        super().close()
        self.on_change()

    def done(self) -> None:
        """Count one item less."""
        self._not_done -= 1
        if self._not_done < self.maxsize:
            self._may_begin.set()

    async def room(self) -> None:
        """Wait until fewer than `maxsize` items are not done.

        Raises:
            StoppedEarly: It is full, and the run is draining.
        """
        while self._not_done >= self.maxsize:
            if self._is_draining:
                raise StoppedEarly("draining: outcomes wait to be delivered")
            await self._may_begin.wait()

    def drain(self) -> None:
        """Make `room` raise instead of waiting, now and from now on."""
        self._is_draining = True
        self._may_begin.set()


async def _wait_to_be_woken(waiters: deque[asyncio.Future[None]], can_proceed: Callable[[], bool]) -> None:
    """Wait until woken. A waiter cancelled after it was woken wakes the next one instead."""
    waiter = asyncio.get_running_loop().create_future()
    waiters.append(waiter)
    try:
        await waiter
    except asyncio.CancelledError:
        if waiter.cancelled():
            with suppress(ValueError):  # a later wake-up may have removed it already
                waiters.remove(waiter)
        elif can_proceed():
            _wake_one(waiters)
        raise


def _wake_one(waiters: deque[asyncio.Future[None]]) -> None:
    while waiters:
        waiter = waiters.popleft()
        if not waiter.done():
            waiter.set_result(None)
            return


def _wake_all(waiters: deque[asyncio.Future[None]]) -> None:
    while waiters:
        _wake_one(waiters)
