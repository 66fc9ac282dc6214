"""Batches of rows of a run at a daemon, waited for. A lost connection is made again."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

from streamsyn.errors import RunReplaced, ServerError, ServerUnavailable
from streamsyn.following.daemon_client import DaemonClient, NoSuchRun, RowStream
from streamsyn.following.feed import Batch, check_after
from streamsyn.following.loop_thread import LoopThread
from streamsyn.following.reconnecting import Reconnecting

_LOOK_EVERY_S: Final = 2.0
"""Seconds between two looks for a run that does not exist yet."""


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

    def read(self, first: int) -> Batch | None:
        reading = self._thread.submit(self._read(first))
        try:
            return reading.result()
        except BaseException:
            reading.cancel()  # of a KeyboardInterrupt
            raise

    async def aread(self, first: int) -> Batch | None:
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

    async def _read(self, first: int) -> Batch | None:
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

    async def _next(self, first: int) -> Batch | None:
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
