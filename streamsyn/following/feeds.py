"""Batches of rows of a run, waited for: of its directory, or of a daemon. `Follower` reads from them."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from streamsyn.background import finished_in_thread
from streamsyn.errors import ConfigError, RunReplaced, ServerError, ServerUnavailable
from streamsyn.following.daemon_client import DaemonClient, LoopThread, NoSuchRun, Reconnecting, RowStream
from streamsyn.following.run_rows import FolderWatch, Rows, RunRows
from streamsyn.sink.rundir import LOCK_NAME

_NO_LIMIT: Final = 2**62
"""Rows: the size of a batch is limited by its bytes."""
_LOOK_EVERY_S: Final = 2.0
"""Seconds between two looks for a run that does not exist yet."""


class Feed(Protocol):
    """Rows of one run in order, in batches that fit into memory.

    Raises (all reads):
        RunReplaced: A different run is in the place of the one that was read; `restart` makes it the one.
        StreamsynError: The rows cannot be read.
    """

    @property
    def run(self) -> float | None:
        """When the run was created, in Unix seconds, which identifies it; None while there is none."""
        ...

    def read(self, first: int) -> Rows | None:
        """Wait for row `first`; returns it and rows behind it, or None if the run has ended before it."""
        ...

    async def aread(self, first: int) -> Rows | None:
        """As `read`, for the event loop. It can be cancelled and called again."""
        ...

    def restart(self) -> None:
        """Read the run that is there by now."""
        ...

    def close(self) -> None:
        """Close what is open. May be called more than once."""
        ...


def check_after(place: str, first: int, total: int) -> None:
    """Refuse a position behind the end of a run.

    Raises:
        ConfigError: The run has fewer rows than were read before.
    """
    if first > total:
        raise ConfigError(
            f"{place} has ended with {total} rows, but `after` is {first - 1}: it belongs to a different run"
        )


class DirectoryFeed:
    """Feed: the rows of one kind of a run directory.

    Args:
        root: The run directory.
        kind: `samples`, `contexts` or `rejects`.
        run: The run that is expected; None for whichever is there.
        wait: Wait for the directory if it does not exist yet; otherwise that is a ConfigError.
    """

    def __init__(self, root: Path, kind: str, run: float | None, *, wait: bool) -> None:
        self._rows = RunRows(root, kind, run)
        self._watch = FolderWatch()
        self._wait = wait
        self._is_there = False

    @property
    def run(self) -> float | None:
        return self._rows.run

    def restart(self) -> None:
        self._rows = RunRows(self._rows.root, self._rows.kind)

    def read(self, first: int) -> Rows | None:
        while (batch := self._look(first)) is not None and not batch:
            self._watch.wait(math.inf)
        return batch

    async def aread(self, first: int) -> Rows | None:
        while (batch := await finished_in_thread(self._look, first)) is not None and not batch:
            await self._watch.changed(math.inf)
        return batch

    def close(self) -> None:
        self._watch.close()

    def _look(self, first: int) -> Rows | None:
        """The next rows, as far as they are written; None at the end."""
        if not self._is_there:
            self._check()
            self._is_there = True
        self._watch.add(self._rows.folders)
        total = self._rows.total()  # before the rows: those that it counts are there
        if rows := self._rows.rows(first, _NO_LIMIT):
            return rows
        if total is None:
            return rows
        check_after(str(self._rows.root), first, total)
        return None

    def _check(self) -> None:
        """Refuse a directory that is not that of a run, nor may become it."""
        root = self._rows.root
        if root.exists() and not root.is_dir():
            raise ConfigError(f"{root} is not a run directory but a file")
        marks = ("run.json", "manifest.jsonl", LOCK_NAME)
        if not self._wait and not any((root / name).exists() for name in marks):
            what = "does not hold a run" if root.exists() else "does not exist"
            raise ConfigError(f"the run directory {root} {what}; use `wait` to wait for its run")


class DaemonFeed:
    """Feed: the rows of one kind of a run at a daemon.

    It has an event loop in a thread of its own, so that it serves callers with a loop and without one.

    Args:
        client: Asks the daemon.
        kind: `samples`, `contexts` or `rejects`.
        run: The run that is expected; None for whichever is there.
        wait: Wait for the run if the daemon does not have it yet.
        retry_s: Seconds for which an unreachable daemon is tried again.
    """

    def __init__(
        self, client: DaemonClient, kind: str, run: float | None, *, wait: bool, retry_s: float
    ) -> None:
        self._client = client
        self._kind = kind
        self._wait = wait
        self.run = run
        self._stream: RowStream | None = None
        self._closing = AsyncExitStack()
        """Closes the stream."""
        self._reconnecting = Reconnecting(client.url, retry_s)
        self._thread = LoopThread(self._opened(), "streamsyn-follow")

    def read(self, first: int) -> Rows | None:
        reading = self._thread.submit(self._read(first))
        try:
            return reading.result()
        except BaseException:
            reading.cancel()  # of a KeyboardInterrupt
            raise

    async def aread(self, first: int) -> Rows | None:
        return await asyncio.wrap_future(self._thread.submit(self._read(first)))

    def restart(self) -> None:
        self.run = None

    def close(self) -> None:
        self._thread.close()

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[None]:
        async with self._client:
            try:
                yield
            finally:
                await self._closing.aclose()

    async def _read(self, first: int) -> Rows | None:
        while True:
            try:
                return await self._next(first)
            except TimeoutError:  # silence: the run may be slow, or the daemon's machine gone
                await self._disconnect()
                self._reconnecting.succeeded()
            except ServerError as error:
                await self._disconnect()
                await self._reconnecting.pause(error)
            except NoSuchRun:
                if not self._wait or self.run is not None:
                    raise
                await asyncio.sleep(_LOOK_EVERY_S)
            except BaseException:
                await self._disconnect()  # a row may have been lost halfway
                raise

    async def _next(self, first: int) -> Rows | None:
        """The next batch; None at the end."""
        if self._stream is None or self._stream.next != first:
            await self._connect(first)
        assert self._stream is not None
        if rows := await self._stream.read():
            self._reconnecting.succeeded()
            return rows
        await self._disconnect()
        described = await self._describe()
        last = described.get("last", {}).get(self._kind)
        total = 0 if last is None else last + 1
        if described.get("state") == "finished" and total <= first:
            check_after(self._client.url, first, total)
            return None
        raise ServerUnavailable(f"{self._client.url} ended its answer before the run has ended")

    async def _connect(self, first: int) -> None:
        await self._disconnect()
        opened = AsyncExitStack()
        try:
            stream = await opened.enter_async_context(self._client.open(first, follow=True))
            await self._describe()  # after the stream was opened: a run that replaces this one is noticed
        except BaseException:
            await opened.aclose()
            raise
        self._stream, self._closing = stream, opened

    async def _disconnect(self) -> None:
        self._stream = None
        await self._closing.aclose()

    async def _describe(self) -> dict[str, Any]:
        described = await self._client.describe()
        created = described.get("created_at")
        if self.run is not None and created != self.run:
            raise RunReplaced(f"{self._client.url} is now a different run than before")
        self.run = created
        return described
