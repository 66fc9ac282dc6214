"""The samples of a run as a source, while the run goes on: from its directory, or from a daemon."""

import asyncio
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog

from streamsyn.errors import ConfigError, RowsRemoved, RunReplaced, ServerError, StreamsynError
from streamsyn.following.daemon_client import RETRY_S, DaemonClient, LoopThread, Reconnecting, run_url
from streamsyn.following.joined_rows import JoinedRows
from streamsyn.following.run_rows import FolderWatch
from streamsyn.following.shard_lines import Cursor
from streamsyn.trainer.examples import Row

log = structlog.get_logger()

T = TypeVar("T")

_SPAN: Final = 64
"""`pick` reads this many neighbouring rows at once, wanted or not: each read of a directory decompresses a
whole frame of rows, and each one at a daemon is a request."""
_REPORT_TIMEOUT_S: Final = 10.0


def _picked(seqs: Sequence[int], read: Callable[[int, int], Sequence[Row]]) -> Iterator[Row]:
    """Rows by their rising numbers, up to one that does not exist; `read` takes the first and how many."""
    at = 0
    while at < len(seqs):
        first = seqs[at]
        last = seqs[bisect_left(seqs, first + _SPAN) - 1]
        found = read(first, last + 1 - first)
        if not found:
            return
        end = bisect_left(seqs, first + len(found))
        yield from (found[seq - first] for seq in seqs[at:end])
        at = end


class RunSamples:
    """Source: the samples that a run writes, as `JoinedRows` reads them. They end when the run has ended.

    A different run in the place of the first one is an error.

    Args:
        root: The run directory, which need not exist yet.
    """

    name = "run"

    def __init__(self, root: Path) -> None:
        self._samples = JoinedRows(root)
        self._contexts = JoinedRows(root, "contexts")
        self._watch = FolderWatch()

    def fetch(self, first: int, limit: int) -> list[Row]:
        self._watch.add(self._samples.folders)
        found: list[Row] = []
        while len(found) < limit:
            some = self._samples.rows(first + len(found), limit - len(found))
            if not some:
                break
            found += some
        return found

    def total(self) -> int | None:
        self._watch.add(self._samples.folders)
        return self._samples.total()

    def pick(self, seqs: Sequence[int]) -> Iterator[Row]:
        cursor = Cursor()
        return _picked(seqs, lambda first, limit: self._samples.rows(first, limit, cursor=cursor))

    def contexts(self, row: dict[str, Any], seqs: Sequence[int]) -> list[str] | None:
        cursor, found = Cursor(), {}
        contexts = self._contexts.part(row.get("partition"))
        try:
            for seq in sorted(set(seqs)):
                for one in contexts.rows(seq, 1, cursor=cursor):
                    found[seq] = one["context"]
        except RowsRemoved:
            return None
        return [found[seq] for seq in seqs] if found.keys() >= set(seqs) else None

    async def changed(self, timeout_s: float) -> None:
        await self._watch.changed(timeout_s)

    def close(self) -> None:
        self._watch.close()


class DaemonSamples:
    """Source: the samples of a run at a daemon. They end when the run has finished.

    Its rows are those of the run's directory, so that a checkpoint may continue with either. Each read is a
    request of its own; a daemon that cannot be reached is asked again for five minutes.

    Args:
        url: The URL of the run. The token comes from the environment.

    Raises:
        ConfigError: There is no such run, or the token is refused.
    """

    name = "run"

    def __init__(self, url: str) -> None:
        self._client = DaemonClient(run_url(url).url, "samples")
        self._reconnecting = Reconnecting(self._client.url, RETRY_S)
        self._thread = LoopThread(self._client, "streamsyn-samples")
        self._run: Any = None
        """The run's time of creation, which identifies it."""
        self._seen = 0
        """Number of the row behind the last one read."""
        self._reporting: Future[None] | None = None
        self._is_reported = True
        try:
            self.total()
        except BaseException:
            self.close()
            raise

    def fetch(self, first: int, limit: int) -> list[Row]:
        rows = self._ask(partial(self._page, first, limit))
        self._seen = first + len(rows)
        return rows

    def total(self) -> int | None:
        described = self._ask(self._client.describe)
        created = described.get("created_at")
        if self._run is not None and created != self._run:
            raise RunReplaced(f"{self._client.url} is now a different run than before")
        self._run = created
        if described.get("state") != "finished":
            return None
        last = described.get("last", {}).get("samples")
        return 0 if last is None else int(last) + 1

    def pick(self, seqs: Sequence[int]) -> Iterator[Row]:
        return _picked(seqs, lambda first, limit: self._ask(partial(self._page, first, limit)))

    def contexts(self, _row: dict[str, Any], seqs: Sequence[int]) -> list[str] | None:
        wanted = sorted(set(seqs))

        def read(first: int, limit: int) -> list[Row]:
            return self._ask(partial(self._page, first, limit, "contexts"))

        try:
            rows = zip(wanted, _picked(wanted, read), strict=False)
            found = {seq: one["context"] for seq, one in rows if isinstance(one, dict)}
        except ConfigError:  # retention has removed them
            return None
        return [found[seq] for seq in seqs] if found.keys() >= set(seqs) else None

    async def changed(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wrap_future(self._thread.submit(self._retried(self._next_row)))
        except TimeoutError:
            return

    def report(self, consumer: str, seq: int, metrics: Mapping[str, float], *, wait: bool = False) -> None:
        """Tell the daemon how far a training is. Without `wait` this returns at once, and does nothing while
        an earlier report is being sent.

        Args:
            consumer: The name of the consumer; it is created if it does not exist.
            seq: The last row that is not needed any more; -1 for none.
            metrics: Numbers to show.
            wait: Return when it was sent, or failed.
        """
        if self._reporting is not None and not self._reporting.done():
            if not wait:
                return
            self._reporting.result()
        self._reporting = self._thread.submit(self._report(consumer, seq, dict(metrics)))
        if wait:
            self._reporting.result()

    def close(self) -> None:
        self._thread.close()

    async def _report(self, consumer: str, seq: int, metrics: Mapping[str, float]) -> None:
        try:
            async with asyncio.timeout(_REPORT_TIMEOUT_S):
                await self._client.acknowledge(consumer, seq, metrics)
            self._is_reported = True
        except (StreamsynError, TimeoutError) as error:
            if self._is_reported:
                log.warning("train.not_reported", url=self._client.url, consumer=consumer, why=str(error))
            self._is_reported = False

    def _ask(self, ask: Callable[[], Awaitable[T]]) -> T:
        return self._thread.submit(self._retried(ask)).result()

    async def _retried(self, ask: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                answer = await ask()
            except TimeoutError:  # silence
                continue
            except ServerError as error:
                await self._reconnecting.pause(error)
            else:
                self._reconnecting.succeeded()
                return answer

    async def _page(self, first: int, limit: int, kind: str = "samples") -> list[Row]:
        found: list[Row] = []
        async with self._client.open(first, follow=False, limit=limit, kind=kind) as stream:
            while rows := await stream.read():
                found += rows
        return found

    async def _next_row(self) -> None:
        """Return when the next row is there, or the run has ended."""
        async with self._client.open(self._seen, follow=True, limit=1) as stream:
            await stream.read()
