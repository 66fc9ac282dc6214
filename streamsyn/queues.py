"""The bounded queue between two stages."""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class BoundedQueue(Generic[T]):
    """A FIFO that holds at most `maxsize` items; the stage that puts closes it, with a plain call.

    `close` never waits, so it can stand in a task's done-callback: a queue is closed even when the
    stage that puts was cancelled before its first step. Readers get what is left, then the end.
    """

    def __init__(self, maxsize: int) -> None:
        if maxsize < 1:
            raise ValueError(f"a bounded queue holds at least one item, not {maxsize}")
        self.maxsize = maxsize
        self._items: deque[T] = deque()
        self._readers: deque[asyncio.Future[None]] = deque()
        self._writers: deque[asyncio.Future[None]] = deque()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether nothing more will be put; there may be items left."""
        return self._closed

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<BoundedQueue {len(self._items)}/{self.maxsize} {state}>"

    async def put(self, item: T) -> None:
        """Wait for room, then add `item`.

        Raises:
            RuntimeError: The queue is closed; only the stage that puts may close it.
        """
        while len(self._items) >= self.maxsize and not self._closed:
            await _turn(self._writers, lambda: len(self._items) < self.maxsize)
        if self._closed:
            raise RuntimeError("put on a closed queue")
        self._items.append(item)
        _wake_one(self._readers)

    def get_nowait(self, limit: int) -> list[T]:
        """What is there now, at most `limit` items; possibly none."""
        return [self._pop() for _ in range(min(limit, len(self._items)))]

    def close(self) -> None:
        """Say that nothing more will be put. Closing twice is harmless."""
        self._closed = True
        while self._readers or self._writers:
            _wake_one(self._readers)
            _wake_one(self._writers)

    def discard(self) -> int:
        """Drop what waits and say how much it was: for a drain, which starts nothing new."""
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
            await _turn(self._readers, lambda: bool(self._items))
        return self._pop()

    def _pop(self) -> T:
        item = self._items.popleft()
        _wake_one(self._writers)
        return item


async def _turn(waiters: deque[asyncio.Future[None]], can_go_on: Callable[[], bool]) -> None:
    """Wait to be woken. One who is cancelled after being woken passes the turn on."""
    waiter = asyncio.get_running_loop().create_future()
    waiters.append(waiter)
    try:
        await waiter
    except asyncio.CancelledError:
        if waiter.cancelled():
            with suppress(ValueError):  # a wake-up that came later may have dropped it already
                waiters.remove(waiter)
        elif can_go_on():
            _wake_one(waiters)
        raise


def _wake_one(waiters: deque[asyncio.Future[None]]) -> None:
    while waiters:
        waiter = waiters.popleft()
        if not waiter.done():
            waiter.set_result(None)
            return
