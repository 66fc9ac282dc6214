"""A run that goes on in a thread of its own beside a block, and ends with it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from streamsyn.background import Background, background, finished_in_thread
from streamsyn.library.run_thread import RunThread, call_when_open, failure
from streamsyn.library.seed_feed import SeedFeed
from streamsyn.library.written_rows import ReadAhead, Written
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.summary import RunSummary
from streamsyn.sink.shards import KINDS
from streamsyn.telemetry import Counters

State: TypeAlias = Literal["running", "stopping", "finished", "stopped", "failed"]


class BackgroundRun:
    """A run in the background, for one event loop.

    Args:
        request: What is to be run.
        feed: Feeds seeds to it, if they come from an iterable.
        ahead: Holds up the run while its samples are not asked for.

    Attributes:
        written: Which rows are written, and whether the run has ended.
    """

    def __init__(self, request: RunRequest, feed: SeedFeed | None, ahead: ReadAhead) -> None:
        self.request = request
        self.feed = feed
        self.ahead = ahead
        self.written = Written(KINDS)
        self.summary = RunSummary(request.out, Counters())
        """Complete when the run has ended."""
        self._thread = RunThread(request, self.summary, self._on_end)
        self._is_asked_to_stop = False
        self._error: BaseException | None = None
        self._is_error_raised = False
        request.on_rows = self.written.rows
        request.after_samples = ahead

    @property
    def out(self) -> Path:
        """The run directory."""
        return self.request.out

    @property
    def state(self) -> State:
        """What the run is doing."""
        if not self.written.ended:
            return "stopping" if self._is_asked_to_stop else "running"
        if self._thread.error is not None:
            return "failed"
        return "finished" if self.summary.stopped is None else "stopped"

    @asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        """Begin; the block begins when the directory is locked and the log is open. Its end ends the run.

        Raises:
            StreamsynError: The run cannot begin, or has failed and nobody has been told yet.
            CancelledError: The block was cancelled, or its end, which then stopped the run at once.
        """
        # Not `async with`: a task group would wrap what the block raises.
        beside = AsyncExitStack()
        tasks = await beside.enter_async_context(background())
        raised: BaseException | None = None
        try:
            await self._begin(tasks)
            yield
        except BaseException as error:
            raised = error
            raise
        finally:
            try:
                await self._leave(raised)
            finally:
                await beside.aclose()

    def stop(self, why: str) -> None:
        """Start nothing new, and finish what is in flight. From any thread."""
        self._is_asked_to_stop = True
        if self.feed is not None:
            self.feed.stop()
        self.request.control.drain(why)

    def raise_error(self, *, again: bool = True) -> None:
        """Raise the error of the run if it has one; unless `again`, only if it was not raised before."""
        if self._error is not None and (again or not self._is_error_raised):
            self._is_error_raised = True
            raise self._error

    async def _begin(self, tasks: Background) -> None:
        feed = self.feed
        if feed is not None:
            feed.on_error = lambda: self.stop("the seeds could not be read to their end")
            call_when_open(self.request, partial(feed.start, iterates=not feed.is_async))
        self._thread.start()
        while not (self.written.is_open or self.written.ended):
            await self.written.change()
        if self.written.ended:
            self.raise_error()
        if feed is not None and feed.is_async:
            tasks.start(feed.iterate(), name="seeds")

    async def _leave(self, raised: BaseException | None) -> None:
        self.stop("the block was left")
        self.ahead.stop()
        cancelled: asyncio.CancelledError | None = None
        while not self.written.ended:
            try:
                await self.written.change()
            except asyncio.CancelledError as error:
                self.request.control.cancel("cancelled")
                cancelled = error
        await finished_in_thread(self._close)
        if cancelled is not None:
            raise cancelled
        if raised is None:
            self.raise_error(again=False)
        elif self._error is not None and not self._is_error_raised:
            raised.add_note(f"The run in {self.out} failed, too: {self._error}")

    def _close(self) -> None:
        self._thread.join()
        if self.feed is not None:
            self.feed.close()
        if self.request.inbox is not None:
            self.request.inbox.release()

    def _on_end(self) -> None:
        """The run has ended. Called in its thread."""
        self._error = self._thread.error
        if self._error is None and self.feed is not None:
            self._error = self.feed.error
        if self._error is None and not (self._is_asked_to_stop and self.summary.stopped is not None):
            self._error = failure(self.summary, self.request.config.run.max_reject_fraction)
        self.written.end()
