"""`open_run`: a run whose samples are an asynchronous iterator."""

from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
)
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from streamsyn.background import finished_in_thread, in_threads
from streamsyn.errors import ConfigError, InboxClosed
from streamsyn.library.arguments import ConfigLike, Overrides, PathLike, Seeds, Servers, make_request
from streamsyn.library.run_thread import BackgroundRun, State
from streamsyn.library.seed_feed import SeedRows
from streamsyn.library.written_rows import ReadAhead, WrittenRows
from streamsyn.pipeline.summary import RunSummary
from streamsyn.seeds.submission import Submission, Submitted
from streamsyn.telemetry import log_through_logging


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """What a run is doing.

    Attributes:
        state: `running`; `stopping` while it finishes what is in flight; then `finished` if every seed has
            its outcome, `stopped` if it can be resumed, or `failed` if it ended with an error.
        contexts: Contexts in the directory, of all runs into it.
        rejects: Rejects in the directory, likewise.
        samples: Samples in the directory, likewise.
        reasons: The rejects of this run, by reason.
        in_flight: Requests sent to servers and not yet answered.
        submitted: What became of the seeds that were given as an iterable or submitted.
        unread: Seeds among these that the run has not read yet.
        tokens: Tokens that the servers wrote in this run.
        elapsed_s: Seconds since the run began.
    """

    state: State
    contexts: int
    rejects: int
    samples: int
    reasons: dict[str, int] = field(default_factory=dict)
    in_flight: int = 0
    submitted: Submitted = field(default_factory=Submitted)
    unread: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0


class Run:
    """A run that goes on in the background, and the asynchronous iterator of its samples.

    Made by `open_run`. Each sample is a dict: the row of `samples/` in the run directory, with its `seq`. It
    is durable before it is handed out, and is not lost when a wait for it is cancelled. The iteration ends
    when every seed has its outcome, or when the run stops early.

    Methods may be called from the asyncio tasks of one event loop.
    """

    def __init__(self, run: BackgroundRun, first: int) -> None:
        self._run = run
        self._samples = WrittenRows(run.out, "samples", first, run.written)
        self._submitted = Submitted()

    @property
    def out(self) -> Path:
        """The run directory."""
        return self._run.out

    @property
    def summary(self) -> RunSummary:
        """The summary of the run, as of the command; complete when the run has ended."""
        return self._run.summary

    def __aiter__(self) -> Self:
        """Iterate over the samples.

        Raises:
            ConfigError: `assembly.write` is false: the run makes none.
        """
        if not self._run.request.config.assembly.write:
            raise ConfigError("assembly.write = false makes no samples; use outcomes()")
        return self

    async def __anext__(self) -> dict[str, Any]:
        """Return the next sample. Not asking for it slows the run down.

        Raises:
            StoppedEarly: The run stopped early and can be resumed; all samples so far were handed out.
            TooManyRejects: Rejects exceed `run.max_reject_fraction`.
            ConfigError, SinkError, LaunchError: The run failed.
        """
        self._run.ahead.ask(self._samples.position + 1)
        sample = await self._samples.next()
        if sample is None:
            self._run.raise_error()
            raise StopAsyncIteration
        return sample

    async def outcomes(self) -> AsyncIterator[dict[str, Any]]:
        """Iterate over contexts and rejects, from the first of the directory to the end of the run.

        Each kind comes in the order of the log; a reject has a `reason`. From now on the run does not wait
        for whoever iterates over its samples.

        Raises:
            StoppedEarly, TooManyRejects, ConfigError, SinkError, LaunchError: As for samples.
        """
        self._run.ahead.stop()
        rows = [WrittenRows(self.out, kind, 0, self._run.written) for kind in ("contexts", "rejects")]
        while True:
            heads = [(await one.head(), one) for one in rows if one.is_behind]
            if heads:
                _, first = min(heads, key=lambda head: head[0].get("written_at", 0.0))
                if (row := await first.next()) is not None:
                    yield row
            elif self._run.written.ended:
                break
            else:
                await self._run.written.change()
        self._run.raise_error()

    async def submit(self, seeds: Mapping[str, Any] | SeedRows) -> Submitted:
        """Give the run more seeds. On return they are on disk, and a kill loses none of them.

        Args:
            seeds: One seed, or an iterable or asynchronous iterable of seeds: dicts with `instruction` and
                `answer`.

        Returns:
            The numbers of seeds that were accepted, that were submitted before, and that were refused, and
            what is wrong with the latter.

        Raises:
            InboxClosed: The run takes no more seeds: `close_seeds` was called, or the run was opened with
                seeds and without `keep_open`.
            SinkError: They cannot be written.
        """
        inbox = self._run.request.inbox
        if inbox is None or self._run.written.ended:
            raise InboxClosed(f"the run in {self.out} takes no more seeds; keep_open=True keeps a run open")
        rows: SeedRows = [seeds] if isinstance(seeds, Mapping | str | bytes) else seeds
        async with in_threads(inbox.submission()) as submission:
            if isinstance(rows, AsyncIterable):
                async for row in rows:
                    await finished_in_thread(submission.add, row)
            else:
                await finished_in_thread(_add_all, submission, rows)
            submitted = await finished_in_thread(submission.finish)
        self._submitted = _sum(self._submitted, submitted)
        return submitted

    async def close_seeds(self) -> None:
        """No more seeds are submitted: the run ends when every seed has its outcome.

        After the end of the run this does nothing.

        Raises:
            SinkError: It cannot be written.
        """
        if self._run.request.inbox is not None:
            with suppress(InboxClosed):  # the run has ended
                await finished_in_thread(self._run.request.inbox.close)

    def status(self) -> RunStatus:
        """What the run is doing."""
        counters, inbox = self.summary.counters, self._run.request.inbox
        fed = Submitted() if self._run.feed is None else self._run.feed.submitted
        return RunStatus(
            state=self._run.state,
            contexts=self._run.written["contexts"],
            rejects=self._run.written["rejects"],
            samples=self._run.written["samples"],
            reasons={str(reason): number for reason, number in list(counters.rejects.items())},
            in_flight=sum(server["in_flight"] for server in self.summary.servers()),
            submitted=_sum(self._submitted, fed),
            unread=0 if inbox is None else inbox.unread,
            tokens=counters.useful_tokens + counters.wasted_tokens,
            elapsed_s=counters.elapsed_s,
        )

    def drain(self) -> Awaitable[RunSummary]:
        """Start nothing new, and finish what is in flight, for at most `run.drain_timeout_s`.

        The run then ends, resumable, and so does the iteration over its samples.

        Returns:
            As `wait`, for whoever awaits it; it need not be awaited.
        """
        self._run.stop("drained")
        return _Waiting(self.wait)

    async def wait(self) -> RunSummary:
        """Wait until the run has ended. From now on it does not wait for whoever iterates over its samples.

        Raises:
            StoppedEarly, TooManyRejects, ConfigError, SinkError, LaunchError: As for samples.
        """
        self._run.ahead.stop()
        while not self._run.written.ended:
            await self._run.written.change()
        self._run.raise_error()
        return self.summary


class open_run(AbstractAsyncContextManager[Run]):  # noqa: N801 - it is used as a function, as `suppress` is
    """Open a run, which goes on in the background within the block; the object iterates over its samples.

        async with streamsyn.open_run("run.toml", out="runs/first", seeds="pairs.jsonl") as run:
            async for sample in run:
                ...

    The run has a thread of its own: code in the block that blocks does not delay it. The block may be left at
    any time. The run then starts nothing new and finishes what is in flight, for at most
    `run.drain_timeout_s`; a cancellation meanwhile stops it at once. The same call resumes it.

    Each of the errors is raised by the iteration, by `Run.wait`, and at the end of the block if it was not
    raised before. What cannot work at all is raised before the block begins.

    Args:
        config: A TOML file, a dict of its sections, or a `Config`. By default the configuration that `out`
            was begun with, if it exists.
        out: The run directory; an existing one is resumed.
        seeds: A path or a list of paths (files, directories, globs, URLs), or an iterable or asynchronous
            iterable of dicts. What comes from an iterable is on disk before it is acted on. An iterable is
            iterated over in a thread, an asynchronous one in the event loop of the caller. By default
            `seeds.sources` of the configuration, and what `out` already holds.
        servers: URLs of servers, or dicts with `url`, `weight` and `key_env`, in place of `fleet.servers`.
        launch: Model to start a local SGLang server with for this run.
        limit: Read at most this many seeds.
        overrides: Dotted keys of the configuration and their values, such as `{"recipe.target_words": 500}`.
        after: The `seq` of the last sample already seen. By default the iteration begins with the first
            sample of the directory, those of earlier runs included.
        buffer: Backpressure: when this many samples are written that nobody has asked for, the run waits.
        keep_open: Whether `Run.submit` is possible until `Run.close_seeds`, without which the run does not
            end. By default if there are no seeds otherwise and `out` is new: a run that is opened again
            finishes what it holds, and ends.
        preflight: Check a sample of the seeds, and one request, before a new run starts.

    Raises:
        ConfigError: A setting, an argument, a source of seeds or the directory cannot be used.
        DirectoryInUse: A run is writing to the directory.
        StoppedEarly: The run stopped early, and not because it was asked to; it can be resumed.
        TooManyRejects: Rejects exceed `run.max_reject_fraction`.
        SinkError: The log cannot be written; the directory can be resumed.
        LaunchError: The server to be launched did not come up.
        Exception: What the iterable of seeds raised.
    """

    def __init__(
        self,
        config: ConfigLike | None = None,
        *,
        out: PathLike,
        seeds: Seeds | None = None,
        servers: Servers | None = None,
        launch: str | None = None,
        limit: int | None = None,
        overrides: Overrides = (),
        after: int | None = None,
        buffer: int = 64,
        keep_open: bool | None = None,
        preflight: bool = True,
    ) -> None:
        if buffer < 1:
            raise ConfigError(f"buffer must be at least 1, not {buffer}")
        if after is not None and not (isinstance(after, int) and after >= -1):
            raise ConfigError(f"after={after!r}: expected the seq of a sample, or None")
        self._first = 0 if after is None else after + 1
        self._ahead = ReadAhead(buffer, self._first)
        self._make_request = partial(
            make_request,
            config,
            out=out,
            seeds=seeds,
            servers=servers,
            launch=launch,
            limit=limit,
            overrides=overrides,
            keep_open=keep_open,
            preflight=preflight,
            show_progress=False,
        )
        self._going_on = AsyncExitStack()

    async def __aenter__(self) -> Run:
        """Begin the run."""
        log_through_logging()
        request, feed = await finished_in_thread(self._make_request)
        run = BackgroundRun(request, feed, self._ahead)
        await self._going_on.enter_async_context(run.going_on())
        return Run(run, self._first)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the run."""
        await self._going_on.__aexit__(kind, raised, traceback)


class _Waiting:
    """Begins to wait when it is awaited."""

    def __init__(self, wait: Callable[[], Coroutine[Any, Any, RunSummary]]) -> None:
        self._wait = wait

    def __await__(self) -> Generator[Any, Any, RunSummary]:
        return self._wait().__await__()


def _add_all(submission: Submission, rows: Iterable[Mapping[str, Any]]) -> None:
    for row in rows:
        submission.add(row)


def _sum(one: Submitted, other: Submitted) -> Submitted:
    return Submitted(
        accepted=one.accepted + other.accepted,
        duplicate=one.duplicate + other.duplicate,
        refused_total=one.refused_total + other.refused_total,
        refused=[*one.refused, *other.refused],
    )
