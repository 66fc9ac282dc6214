"""Asyncio tasks that have no end of their own: probes, aborts."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any


class Background:
    """Tasks of a group that end with the block that opened it: cancelled, or finished if they must be."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: set[asyncio.Task[None]] = set()
        self._finishing: set[asyncio.Task[None]] = set()
        self._closing = False

    def start(
        self, work: Coroutine[Any, Any, None], name: str, *, finish: bool = False
    ) -> asyncio.Task[None] | None:
        """Run `work` beside everything else; not at all, and None, when the block is ending.

        With `finish`, the block waits for it at its end: it must be bounded in time.
        """
        if self._closing:
            work.close()
            return None
        try:
            task = self._group.create_task(work, name=name)
        except RuntimeError:  # a bug in another one is ending the block
            work.close()
            return None
        tasks = self._finishing if finish else self._tasks
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    async def close(self) -> None:
        """Cancel what has no end; wait for what has one, which the group would cancel after an error."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        if self._finishing:
            await asyncio.wait(self._finishing)


@asynccontextmanager
async def background() -> AsyncIterator[Background]:
    """Open a Background; a bug in one of its tasks ends the block."""
    async with asyncio.TaskGroup() as group:
        tasks = Background(group)
        try:
            yield tasks
        finally:
            await tasks.close()
