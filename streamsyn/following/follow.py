"""`follow`: the rows of a run, one after the other, while they are written."""

import os
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import structlog

from streamsyn.config.data_paths import is_url
from streamsyn.errors import ConfigError, RunReplaced
from streamsyn.following.daemon_client import RETRY_S, DaemonClient, run_url
from streamsyn.following.feeds import DaemonFeed, DirectoryFeed, Feed
from streamsyn.following.run_rows import Rows
from streamsyn.sink.shards import KINDS

log = structlog.get_logger()

Kind: TypeAlias = Literal["samples", "contexts", "rejects"]


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
    - If the directory disappears, `stream.gone` is logged and the iterator waits. A run that is deleted at a
      daemon is an error.
    - Contexts and rejects of a directory are seen before they are synced: a loss of power may take the last
      ones back, and others get their numbers. A daemon shows them when they are safe. Samples are never
      taken back.

    It is closed at its end, when it is no longer used, or by `close`; `with` and `async with` also close it.
    """

    def __init__(self, place: str, feed: Feed, after: int, *, raises: bool) -> None:
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
