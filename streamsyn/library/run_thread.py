"""A run in a thread: `run_sync`, from its beginning to its end, and a run that goes on beside a block.

`run_sync` runs in this thread, or in one with an event loop of its own where this thread has a loop already.
A `BackgroundRun` always has a thread of its own, and ends with its block.
"""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, TypeAlias

from streamsyn.background import Background, background, finished_in_thread
from streamsyn.errors import StoppedEarly, StreamsynError, TooManyRejects
from streamsyn.library.arguments import ConfigLike, Overrides, PathLike, Seeds, Servers, make_request
from streamsyn.library.seed_feed import SeedFeed
from streamsyn.library.written_rows import ReadAhead, Written
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run, run_in_loop
from streamsyn.pipeline.summary import RunSummary, too_many_rejects
from streamsyn.sink.shards import KINDS
from streamsyn.telemetry import Counters, log_through_logging

State: TypeAlias = Literal["running", "stopping", "finished", "stopped", "failed"]


class RunThread:
    """Runs a pipeline in a thread with an event loop of its own.

    Args:
        request: What is to be run.
        summary: Filled while the run goes on.
        on_end: Called in the thread when the run has ended.

    Attributes:
        error: What the run raised, once it has ended.
    """

    def __init__(
        self, request: RunRequest, summary: RunSummary, on_end: Callable[[], None] = lambda: None
    ) -> None:
        request.handles_signals = False
        self.summary = summary
        self.error: BaseException | None = None
        self._request = request
        self._on_end = on_end
        # A daemon: a process that ends without leaving the run leaves a directory that can be resumed.
        self._thread = threading.Thread(target=self._run, name="streamsyn-run", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the end. Blocks."""
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(run_in_loop(self._request, self.summary))
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread of the caller
            self.error = error
        finally:
            self._on_end()


def run_sync(
    config: ConfigLike | None = None,
    *,
    out: PathLike,
    seeds: Seeds | None = None,
    servers: Servers | None = None,
    launch: str | None = None,
    limit: int | None = None,
    overrides: Overrides = (),
    preflight: bool = True,
) -> RunSummary:
    """Run until every seed has its outcome, and return the summary: `streamsyn run` as a function.

    In the main thread, Ctrl-C drains the run: what is in flight is finished, for at most
    `run.drain_timeout_s`, and the summary is returned, whose `stopped` has the reason. A second Ctrl-C stops
    the run at once. The same call resumes.

    Args:
        config: A TOML file, a dict of its sections, or a `Config`. By default the configuration that `out`
            was begun with, if it exists.
        out: The run directory; an existing one is resumed.
        seeds: A path or a list of paths, or an iterable or asynchronous iterable of dicts, which is iterated
            over in a thread. By default `seeds.sources` of the configuration.
        servers: URLs of servers, or dicts with `url`, `weight` and `key_env`, in place of `fleet.servers`.
        launch: Model to start a local SGLang server with for this run.
        limit: Read at most this many seeds.
        overrides: Dotted keys of the configuration and their values.
        preflight: Check a sample of the seeds, and one request, before a new run starts.

    Raises:
        ConfigError: A setting, an argument, a source of seeds or the directory cannot be used.
        DirectoryInUse: A run is writing to the directory.
        StoppedEarly: The run stopped early, but not by a signal; it can be resumed.
        TooManyRejects: Rejects exceed `run.max_reject_fraction`.
        SinkError: The log cannot be written; the directory can be resumed.
        LaunchError: The server to be launched did not come up.
        Exception: What the iterable of seeds raised.
    """
    log_through_logging()
    request, feed = make_request(
        config,
        out=out,
        seeds=seeds,
        servers=servers,
        launch=launch,
        limit=limit,
        overrides=overrides,
        preflight=preflight,
        show_progress=False,
    )
    summary = run_to_end(request, feed)
    error = failure(summary, request.config.run.max_reject_fraction)
    is_asked_for = summary.stopped is not None and summary.interrupted and not summary.too_many_rejects
    if error is not None and not is_asked_for:
        raise error
    return summary


def run_to_end(
    request: RunRequest, feed: SeedFeed | None = None, summary: RunSummary | None = None
) -> RunSummary:
    """Run until every seed has an outcome, or until stopped; the command line and `run_sync` do this.

    In the main thread of a process, a signal drains the run and a second one stops it. Where an event loop
    is running in this thread, as in a notebook, an interrupt does the same.

    Args:
        request: What is to be run.
        feed: Feeds seeds to it, if they come from an iterable.
        summary: A summary to fill while the run goes on.

    Raises:
        ConfigError, SinkError, LaunchError: As `pipeline.run.run`.
        Exception: What the iterable of seeds raised.
    """
    summary = summary or RunSummary(request.out, Counters())
    if feed is None:
        return _run_here(request, summary)
    feed.on_error = lambda: request.control.drain("the seeds cannot be read to their end")
    call_when_open(request, feed.start)
    try:
        _run_here(request, summary)
    finally:
        feed.close()
        feed.inbox.release()
    if feed.error is not None:
        raise feed.error
    return summary


def call_when_open(request: RunRequest, call: Callable[[], None]) -> None:
    """Have `call` called in a thread of the run when its directory is locked and its log is open."""
    missing, tell = set(KINDS), request.on_rows

    def on_rows(kind: str, rows: int) -> None:
        tell(kind, rows)
        if missing:
            missing.discard(kind)
            if not missing:
                call()

    request.on_rows = on_rows


def failure(summary: RunSummary, allowed: float) -> StreamsynError | None:
    """The error of a run that stopped early or has too many rejects; None for one that went well.

    Args:
        summary: Its summary.
        allowed: `run.max_reject_fraction`.
    """
    if summary.stopped is not None:
        kind = TooManyRejects if summary.too_many_rejects else StoppedEarly
        return kind(f"{summary.stopped}; {summary.out} can be resumed")
    text = too_many_rejects(summary, allowed)
    return None if text is None else TooManyRejects(text)


def _run_here(request: RunRequest, summary: RunSummary) -> RunSummary:
    if threading.current_thread() is threading.main_thread() and not _in_loop():
        return run(request, summary)
    noted: SimpleQueue[bool] = SimpleQueue()  # True: Ctrl-C; False: the run has ended
    thread, interrupts = RunThread(request, summary, partial(noted.put, False)), 0
    with _interrupts_noted(noted):
        thread.start()
        while noted.get():
            interrupts += 1
            stop = request.control.drain if interrupts == 1 else request.control.cancel
            stop("stopped by SIGINT")
        thread.join()
    if thread.error is not None:
        raise thread.error
    summary.interrupted = interrupts > 0
    return summary


@contextmanager
def _interrupts_noted(noted: SimpleQueue[bool]) -> Iterator[None]:
    """Have Ctrl-C put True in `noted` within the block; an event loop may have set a different handler.

    A KeyboardInterrupt would be raised wherever this thread is, also while the one before is being handled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: noted.put(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _in_loop() -> bool:
    """Whether an event loop is running in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


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
