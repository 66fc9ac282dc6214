"""Work beside a block that ends with it: background asyncio tasks, and contexts whose ends block."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractContextManager, asynccontextmanager
from contextvars import Context, copy_context
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """Starts background tasks. At the end of the block they are cancelled, or awaited if they must finish."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: set[asyncio.Task[None]] = set()
        self._finishing: set[asyncio.Task[None]] = set()
        self._closing = False

    def start(
        self,
        work: Coroutine[Any, Any, None],
        name: str,
        *,
        finish: bool = False,
        context: Context | None = None,
    ) -> asyncio.Task[None] | None:
        """Run `work` as a background task.

        Args:
            work: The coroutine to run.
            name: Name of the asyncio task.
            finish: Await the task at the end of the block instead of cancelling it. Its time must be bounded.
            context: Its context variables; None copies the caller's.

        Returns:
            The task, or None if the block is ending: then `work` is not run.
        """
        if self._closing:
            work.close()
            return None
        try:
            task = self._group.create_task(work, name=name, context=context)
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


@asynccontextmanager
async def in_threads(blocking: AbstractContextManager[T]) -> AsyncIterator[T]:
    """Enter and leave a context whose beginning and end block, each in a thread.

    Neither is abandoned when the caller is cancelled: what was opened is closed first.
    """
    try:
        value = await finished_in_thread(blocking.__enter__)
    except _CancelledMeanwhile:
        await finished_in_thread(blocking.__exit__, None, None, None)
        raise
    try:
        yield value
    except BaseException as error:
        if not await finished_in_thread(blocking.__exit__, type(error), error, error.__traceback__):
            raise
    else:
        await finished_in_thread(blocking.__exit__, None, None, None)


async def finished_in_thread(call: Callable[..., T], *args: Any) -> T:
    """Run a blocking call in a thread and wait for its end, even if cancelled; then raise the cancellation.

    Raises:
        CancelledError: The caller was cancelled, and the call has returned.
        Exception: What the call raised.
    """
    context = copy_context()  # for what the caller has bound to its log lines
    working = asyncio.get_running_loop().run_in_executor(None, partial(context.run, call, *args))
    cancelled = False
    while not working.done():
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError:
            cancelled = True
    result = working.result()
    if cancelled:
        raise _CancelledMeanwhile
    return result


class _CancelledMeanwhile(asyncio.CancelledError):
    """Raised when the caller was cancelled while a call was made that returned."""
