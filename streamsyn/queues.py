"""The bounded queue between two stages: a full queue makes the stage before it wait (backpressure)."""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class BoundedQueue(Generic[T]):
    """A FIFO of at most `maxsize` items, closed by the stage that puts. Read it with `async for`.

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
        self._writers: deque[asyncio.Future[None]] = deque()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called; items may be left."""
        return self._closed

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<BoundedQueue {len(self._items)}/{self.maxsize} {state}>"

    async def put(self, item: T) -> None:
        """Wait until the queue is not full, then add `item`.

        Raises:
            RuntimeError: The queue is closed; only the stage that puts may close it.
        """
        while len(self._items) >= self.maxsize and not self._closed:
            await _wait_to_be_woken(self._writers, lambda: len(self._items) < self.maxsize)
        if self._closed:
            raise RuntimeError("put on a closed queue")
        self._items.append(item)
        _wake_one(self._readers)

    def get_nowait(self, limit: int) -> list[T]:
        """Remove and return at most `limit` items without waiting; possibly none."""
        return [self._pop() for _ in range(min(limit, len(self._items)))]

    def close(self) -> None:
        """Mark the end: nothing more will be put. May be called more than once."""
        self._closed = True
        while self._readers or self._writers:
            _wake_one(self._readers)
            _wake_one(self._writers)

    def discard(self) -> int:
        """Remove all items and return their number. Used by a drain, which starts nothing new."""
        dropped = len(self._items)
        while self._items:
            self._pop()
        return dropped

    def __aiter__(self) -> "BoundedQueue[T]":
        return self

    async def __anext__(self) -> T:
        while not self._items:
            if self._closed:
                raise StopAsyncIteration
            await _wait_to_be_woken(self._readers, lambda: bool(self._items))
        return self._pop()

    def _pop(self) -> T:
        item = self._items.popleft()
        _wake_one(self._writers)
        return item


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
