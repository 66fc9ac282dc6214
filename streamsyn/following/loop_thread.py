"""An event loop in a thread of its own, for callers that have none, or must not be held up."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines in a thread's event loop, within an async context that it opens and closes.

    Args:
        context: Opened in the loop before the first coroutine runs, closed after the last.
        name: Name of the thread.
    """

    def __init__(self, context: AbstractAsyncContextManager[object], name: str) -> None:
        self._context = context
        self._loop = asyncio.new_event_loop()
        self._opened = self._loop.create_future()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the loop. To cancel the future cancels the coroutine."""
        return asyncio.run_coroutine_threadsafe(self._within(work), self._loop)

    def close(self) -> None:
        """Cancel what runs, close the context, and wait for the end of the thread. May be called again.

        It does not wait when it is called in an event loop, which that would hold up.
        """
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._stop.set)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._thread.join()

    async def _within(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            await asyncio.shield(self._opened)
        except BaseException:
            work.close()
            raise
        return await work

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        async with self._context:
            self._opened.set_result(None)
            await self._stop.wait()
