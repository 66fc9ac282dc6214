"""Background asyncio tasks, such as probes and aborts, that end with the block that opened them."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any


class Background:
    """Starts background tasks. At the end of the block they are cancelled, or awaited if they must finish."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: set[asyncio.Task[None]] = set()
        self._finishing: set[asyncio.Task[None]] = set()
        self._closing = False

    def start(
        self, work: Coroutine[Any, Any, None], name: str, *, finish: bool = False
    ) -> asyncio.Task[None] | None:
        """Run `work` as a background task.

        Args:
            work: The coroutine to run.
            name: Name of the asyncio task.
            finish: Await the task at the end of the block instead of cancelling it. Its time must be bounded.

        Returns:
            The task, or None if the block is ending: then `work` is not run.
        """
        if self._closing:
            work.close()
            return None
        try:
            task = self._group.create_task(work, name=name)
        except RuntimeError:  # a bug in a different task is ending the block
            work.close()
            return None
        tasks = self._finishing if finish else self._tasks
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    async def close(self) -> None:
        """Cancel the tasks, and await those that must finish, which the group would cancel after an error."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        if self._finishing:
            await asyncio.wait(self._finishing)


@asynccontextmanager
async def background() -> AsyncIterator[Background]:
    """Open a Background. An exception in one of its tasks cancels the block."""
    async with asyncio.TaskGroup() as group:
        tasks = Background(group)
        try:
            yield tasks
        finally:
            await tasks.close()
