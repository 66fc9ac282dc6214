"""`follow`: the rows of a run, one after the other, while they are written.

A feed waits for batches of rows, of a run directory or of a daemon; the iterator that `follow` returns reads
from it.
"""

import asyncio
import math
import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, Protocol, Self, TypeAlias

import structlog

from streamsyn.background import finished_in_thread
from streamsyn.config.data_paths import is_url
from streamsyn.errors import ConfigError, RunReplaced, ServerError, ServerUnavailable
from streamsyn.following.daemon_client import (
    RETRY_S,
    DaemonClient,
    LoopThread,
    NoSuchRun,
    Reconnecting,
    RowStream,
    run_url,
)
from streamsyn.following.joined_rows import JoinedRows
from streamsyn.following.run_rows import FolderWatch, Rows
from streamsyn.sink.partitions import FILE
from streamsyn.sink.rundir import LOCK_NAME
from streamsyn.sink.shards import KINDS

log = structlog.get_logger()

Kind: TypeAlias = Literal["samples", "contexts", "rejects"]

_NO_LIMIT: Final = 2**62
"""Rows: the size of a batch is limited by its bytes."""
_LOOK_EVERY_S: Final = 2.0
"""Seconds between two looks for a run that does not exist yet."""


def follow(
    source: str | os.PathLike[str],
    after: int | None = None,
    *,
    kind: Kind | None = None,
    run: float | None = None,
    wait: bool = False,
    on_replaced: Literal["follow", "raise"] = "follow",
    token: str | None = None,
    retry_s: float = RETRY_S,
) -> "Follower":
    """Return the rows of a run, as an iterator and an async iterator of dicts; see `Follower`.

        for sample in streamsyn.follow("runs/first"):
            print(sample["seq"], sample["messages"][-1]["content"])

    Args:
        source: A run directory, or the URL of a run at a daemon, `http://HOST:PORT/v1/runs/ID`.
        after: The `seq` of the last row already seen; None begins with the first row.
        kind: Which rows; None is what the URL ends with, or `samples`.
        run: The run that `after` belongs to, from `Follower.run`: a different one counts as replaced.
        wait: Wait for a run that does not exist yet.
        on_replaced: Whether to follow a different run in its place, or to raise RunReplaced.
        token: The daemon's token; None takes it from the environment variable `STREAMSYN_TOKEN`.
        retry_s: Seconds for which a daemon that cannot be reached is tried again.

    Raises (here or while iterating):
        ConfigError: There is no such run; the URL, the token or an argument is wrong.
        SinkError: A row that must exist cannot be read, or was removed by retention (daemon: ConfigError).
        RunReplaced: A different run is in the place of the one that was followed.
        ServerError: The daemon was not reachable for `retry_s`, or does not answer as a daemon does.
    """
    if on_replaced not in ("follow", "raise"):
        raise ConfigError(f"on_replaced={on_replaced!r}: expected 'follow' or 'raise'")
    if after is not None and not (isinstance(after, int) and after >= -1):
        raise ConfigError(f"after={after!r}: expected the seq of a row, or None")
    place = os.fspath(source)
    named = None
    if is_url(place):
        place, named = run_url(place)
    rows: str = kind or named or "samples"
    if rows not in KINDS or named not in (None, rows):
        raise ConfigError(f"kind={kind!r}: expected {named or ', '.join(KINDS)}")
    feed: Feed
    if is_url(place):
        feed = DaemonFeed(DaemonClient(place, rows, token), rows, run, wait=wait, retry_s=retry_s)
    else:
        feed = DirectoryFeed(Path(place), rows, run, wait=wait)
    return Follower(place, feed, -1 if after is None else after, raises=on_replaced == "raise")


class Follower:
    """The rows of a run, made by `follow`: in order, each once. One caller at a time iterates.

    It waits for rows that are not written yet, and ends when the run has ended. To continue later, keep `seq`
    and pass it as `after`.

    - A run that is killed, stopped or failed is waited for, and followed on when it is resumed. So is one
      that is taken up again after its end, by `streamsyn retry` or with new seeds, before the iterator has
      seen that end. If it is taken up later, follow again with `after` for the new rows.
    - A run that is deleted and begun anew in its place is followed from its first row; `follow.replaced` is
      logged as a warning, and `run` has changed then.
    - With partitions, `seq` is the number of a row in the order of all of them, which never changes, and
      `partition` and `partition_seq` name the row within its partition. `context_seqs` belong to that
      partition. A partition that is behind holds up the others.
    - If the directory disappears, `stream.gone` is logged and the iterator waits. A run that is deleted at a
      daemon is an error.
    - Contexts and rejects of a directory are seen before they are synced: a loss of power may take the last
      ones back, and others get their numbers. A daemon shows them when they are safe. Samples are never
      taken back.

    It is closed at its end, when it is no longer used, or by `close`; `with` and `async with` also close it.
    """

    def __init__(self, place: str, feed: "Feed", after: int, *, raises: bool) -> None:
        self._place = place
        self._feed = feed
        self._raises = raises
        self._rows: deque[dict[str, Any]] = deque()
        self._next = after + 1
        """Number of the row that is read next."""
        self._ended = False
        self.seq: int | None = after if after >= 0 else None
        """The `seq` of the last row returned; None before the first one."""

    @property
    def run(self) -> float | None:
        """When the run that is followed was created, in Unix seconds, which identifies it; None if it is not
        known yet.
        """
        return self._feed.run

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        while not self._rows:
            if self._ended:
                raise StopIteration
            try:
                self._take(self._feed.read(self._next))
            except RunReplaced as error:
                self._restart(error)
        return self._pop()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> dict[str, Any]:
        while not self._rows:
            if self._ended:
                raise StopAsyncIteration
            try:
                self._take(await self._feed.aread(self._next))
            except RunReplaced as error:
                self._restart(error)
        return self._pop()

    def close(self) -> None:
        """Stop following: the iteration ends. May be called more than once."""
        self._ended = True
        self._rows.clear()
        self._feed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(AttributeError):  # it was not made
            self._feed.close()

    def _take(self, batch: Rows | None) -> None:
        if batch is None:
            self.close()
        else:
            self._rows.extend(batch)
            self._next += len(batch)

    def _pop(self) -> dict[str, Any]:
        row = self._rows.popleft()
        self.seq = row["seq"]
        return row

    def _restart(self, error: RunReplaced) -> None:
        """Begin with the run that is there now."""
        if self._raises:
            raise error
        log.warning(
            "follow.replaced", run=self._place, why="a different run is in its place: it is followed now"
        )
        self._feed.restart()
        self._next = 0
        self.seq = None


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
    """Feed: the rows of one kind of a run directory, with partitions as one.

    Args:
        root: The run directory.
        kind: `samples`, `contexts` or `rejects`.
        run: The run that is expected; None for whichever is there.
        wait: Wait for the directory if it does not exist yet; otherwise that is a ConfigError.
    """

    def __init__(self, root: Path, kind: str, run: float | None, *, wait: bool) -> None:
        self._rows = JoinedRows(root, kind, run)
        self._watch = FolderWatch()
        self._wait = wait
        self._is_there = False

    @property
    def run(self) -> float | None:
        return self._rows.run

    def restart(self) -> None:
        self._rows = JoinedRows(self._rows.root, self._rows.kind)

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
        marks = ("run.json", "manifest.jsonl", LOCK_NAME, FILE)
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
