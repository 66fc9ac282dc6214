"""One run under the daemon: its record, its inbox, and the asyncio task that executes it.

The record on disk says what the run wants to be; the task follows. Requests of clients change the state, save
the record, then start or drain the task; so a kill at any moment leaves what was answered.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import structlog

from streamsyn.config.loading import Config
from streamsyn.daemon.consumers import Consumers
from streamsyn.daemon.execution import Execution, Hosting, recounted
from streamsyn.daemon.run_config import run_config, template_layer
from streamsyn.daemon.run_record import ENDED, Figures, Refused, RunRecord, RunState, State
from streamsyn.daemon.tail import RunTails
from streamsyn.daemon.webhook_target import Webhook
from streamsyn.errors import SinkError, StreamsynError
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run_in_loop
from streamsyn.pipeline.summary import RunSummary
from streamsyn.plain_text import message
from streamsyn.recipes.registry import load_recipe
from streamsyn.records import RejectReason
from streamsyn.seeds.inbox import Inbox
from streamsyn.sink.shards import KINDS
from streamsyn.telemetry import Counters

log = structlog.get_logger()

_ANNOUNCED: Final = frozenset({"id", "state", "error", "labels", "counts"})
"""What an event tells of a run."""


class HostedRun:
    """A run that the daemon hosts. For the daemon's event loop.

    Args:
        root: The run directory.
        record: Its record.
        hosting: What all runs share.
        on_state: Called with the run when its state has changed.

    Attributes:
        id: Its id.
        root: The run directory.
        record: What is kept of it.
        tails: Its rows, for readers.
        consumers: Its named consumers.
    """

    def __init__(
        self,
        root: Path,
        record: RunRecord,
        hosting: Hosting,
        on_state: Callable[["HostedRun"], None] = lambda _: None,
    ) -> None:
        self.id = record.id
        self.root = root
        self.record = record
        self.tails = RunTails(root, hosting.streams)
        self.consumers = Consumers(root / "consumers.json")
        self._hosting = hosting
        self._on_state = on_state
        self._state = RunState(record.state, is_closed=record.is_closed, error=record.error)
        self._execution: Execution | None = None
        self._task: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        """Held while the state is changed and saved."""
        self._opening = asyncio.Lock()
        """Held while the inbox is opened or released: a file can be locked once."""
        self._changed = asyncio.Event()
        self._inbox: Inbox | None = None
        self._submitting = 0
        """Requests that are using the inbox."""
        self._is_deleted = False

    @property
    def state(self) -> State:
        """The present state."""
        return self._state.state

    @property
    def accepting(self) -> bool:
        """Whether seeds are accepted."""
        return self._state.accepting and not self._is_deleted

    @property
    def why_not_accepting(self) -> str:
        """Why seeds are refused, and what to do."""
        return "the run is being deleted" if self._is_deleted else self._state.why_not_accepting

    @property
    def is_executed(self) -> bool:
        """Whether its task is at work; a run that was paused may have requests in flight."""
        return self._task is not None

    @property
    def unread_seeds(self) -> int:
        """Accepted seeds that the run has not taken up; 0 while its inbox is not open."""
        return 0 if self._inbox is None else self._inbox.unread

    @property
    def summary(self) -> RunSummary | None:
        """The live summary; None while the run is not executed."""
        return None if self._execution is None else self._execution.summary

    @property
    def rows(self) -> dict[str, int]:
        """Rows of each kind that readers may see."""
        live = {} if self._execution is None else self._execution.rows
        return {**dict.fromkeys(KINDS, 0), **self.record.figures.rows, **live}

    async def load(self) -> None:
        """Read what `as_json` shows and the record does not hold; what cannot be read is logged."""
        try:
            await self.consumers.all()
        except SinkError as error:  # it is raised again to those who use them
            log.error("consumers.unreadable", error=str(error))  # noqa: TRY400 - expected

    async def changed(self) -> None:
        """Wait until the rows or the state have changed."""
        await self._changed.wait()

    async def config(self) -> Config:
        """The run's configuration.

        Raises:
            ConfigError: The operator has changed the configuration to something that it does not go with.
        """
        return await asyncio.to_thread(self._config)

    async def inbox(self) -> Inbox:
        """The run's inbox, open.

        Raises:
            ConfigError, SinkError: It cannot be opened.
        """
        async with self._opening:
            if self._inbox is None:
                self._inbox = await asyncio.to_thread(self._open_inbox)
                if self._inbox.closed:  # a kill may have come before the record said so
                    self._state.close()
            return self._inbox

    async def count_seeds(self) -> None:
        """Open the inbox, so that the run shows the seeds that it had accepted when the daemon was killed."""
        try:
            await self.inbox()
        except StreamsynError as error:  # the run fails when it is executed
            log.error("run.inbox_unreadable", run=self.id, error=str(error))  # noqa: TRY400 - expected

    @asynccontextmanager
    async def submitting(self) -> AsyncIterator[Inbox]:
        """The run's inbox, which stays open during the block, unless the run is deleted.

        Raises:
            ConfigError, SinkError: It cannot be opened.
        """
        self._submitting += 1
        try:
            yield await self.inbox()
        finally:
            self._submitting -= 1
            await self._release_unused()

    def start(self) -> None:
        """Execute the run, if that is what it wants and it is not executed yet."""
        if self._task is None and self._wants_to_run:
            self._task = self._hosting.tasks.start(self._run(), name=f"run {self.id}")

    async def close(self) -> None:
        """Take no more seeds; the run finishes when every seed has its outcome."""
        async with self._saved_change():
            inbox = await self.inbox()
            await asyncio.to_thread(inbox.close)
            self._state.close()
            await self._release_unused()

    async def pause(self) -> None:
        """Begin nothing new; what is in flight is finished.

        Raises:
            Refused: The state does not allow it.
        """
        async with self._saved_change():
            self._state.pause()
        self._stop_execution("paused")

    async def drain(self) -> None:
        """Begin nothing new, refuse seeds; what is in flight is finished.

        Raises:
            Refused: The state does not allow it.
        """
        async with self._saved_change():
            self._state.drain()
        self._stop_execution("drained")

    async def resume(self) -> None:
        """Go on."""
        async with self._saved_change():
            if self.state == "finished":
                inbox = await self.inbox()
                await asyncio.to_thread(inbox.reopen)
            self._state.resume()
        self.start()

    async def retry(self, reasons: Sequence[RejectReason]) -> None:
        """Ask rejects of these reasons again."""
        async with self._saved_change():
            self._state.retry()
            self.record.retry = sorted({*self.record.retry, *reasons})
        self._stop_execution("rejects are asked again")  # its task executes the run once more
        self.start()

    def hold(self, why: str) -> None:
        """End the execution, if there is one; `start` goes on."""
        self._stop_execution(why)

    async def stop(self, why: str, *, at_once: bool = False) -> None:
        """End the execution, whatever the state; the next start of the daemon takes it up again."""
        self._stop_execution(why, at_once=at_once)
        if self._task is not None:
            await asyncio.wait({self._task})

    async def delete(self, *, force: bool) -> None:
        """End the run for good; its directory may be removed afterwards.

        Args:
            force: Give up what is in flight, and what is left to do.

        Raises:
            Refused: The run has work to do, and `force` is not given.
        """
        async with self._changing:
            if not force and (self.is_executed or self.state in {"running", "paused", "stopped"}):
                raise Refused(
                    f"the run is {self.state}: close it and let it finish, or delete it with ?force=true"
                )
            self._is_deleted = True
        self.tails.close()
        await self.stop("the run is deleted", at_once=True)
        await self.release()
        self._notify()

    async def release(self) -> None:
        """Close the files that are open beside an execution."""
        async with self._opening:
            await self._close_inbox()

    async def _release_unused(self) -> None:
        """Close the inbox if the run has ended and no request is using it."""
        if self.state in ENDED:
            async with self._opening:
                if not self._submitting:
                    await self._close_inbox()

    async def _close_inbox(self) -> None:
        inbox, self._inbox = self._inbox, None
        if inbox is not None:
            await asyncio.to_thread(inbox.release)

    def rates(self) -> dict[str, float]:
        """The rates of the last half minute."""
        progress = {} if self._execution is None else self._execution.summary.progress()
        return {name: progress.get(name, 0.0) for name in ("outcomes_per_s", "output_tokens_per_s")}

    def as_json(self) -> dict[str, Any]:
        """The run as the API shows it."""
        record, figures = self.record, self._figures()
        progress = {} if self._execution is None else self._execution.summary.progress()
        accepted = record.accepted if self._inbox is None else self._inbox.accepted
        done = figures.contexts + figures.rejects
        in_flight = sum(progress.get("in_flight", {}).values())
        rows = self.rows
        return {
            "id": self.id,
            "state": self.state,
            "accepting": self.accepting,
            "created_at": record.created_at,
            "weight": record.weight,
            "priority": record.priority,
            "labels": record.labels,
            "error": self._state.error or (self._hosting.held or None if self.state == "running" else None),
            "counts": {
                "accepted": accepted,
                "contexts": figures.contexts,
                "rejects": figures.rejects,
                "samples": figures.samples,
                "in_flight": in_flight,
                "waiting": max(0, accepted - done - in_flight),
            },
            "rejects": figures.reasons,
            "rates": self.rates(),
            "tokens": figures.tokens,
            "prefix": {name: figures.prefix.get(name) for name in ("planned", "achieved")},
            "last": {kind: rows[kind] - 1 if rows[kind] else None for kind in KINDS},
            "consumers": self.consumers.shown(rows),
        }

    def _stop_execution(self, why: str, *, at_once: bool = False) -> None:
        if self._execution is not None:
            self._execution.stop(why, at_once=at_once)

    @asynccontextmanager
    async def _saved_change(self) -> AsyncIterator[None]:
        """Change the state in the block, then save it; if either fails, the state is as before."""
        async with self._changing:
            before, retry = replace(self._state), self.record.retry
            try:
                yield
                await self._save()
            except BaseException:
                self._state, self.record.retry = before, retry
                raise

    async def _announce(self) -> None:
        """Send the event of a new state, if the run has a webhook; with the same id if a kill repeats it."""
        webhook = await asyncio.to_thread(Webhook.load, self.root, "run")
        data = {name: value for name, value in self.as_json().items() if name in _ANNOUNCED}
        await self._hosting.webhooks.announce(webhook, f"run.{self.state}", self.record.events, data)
        self.record.events += 1

    async def _save(self) -> None:
        """Have the record on disk say what the state is now."""
        record, state = self.record, self._state
        if state.state != record.state:
            await self._announce()
        record.state, record.is_closed, record.error = state.state, state.is_closed, state.error
        if self._inbox is not None:
            record.accepted = self._inbox.accepted
        await asyncio.to_thread(self._hosting.epoch.check)
        await asyncio.to_thread(record.save, self.root)
        self._on_state(self)
        self.tails.has_changed()
        self._notify()
        if self._inbox is not None:
            self._inbox.wake()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _run(self) -> None:
        """Execute the run as long as it wants to. No error of it leaves this task."""
        structlog.contextvars.clear_contextvars()  # of the request that started it
        structlog.contextvars.bind_contextvars(run=self.id)
        try:
            while self._wants_to_run:
                await self._execute()
                async with self._changing:
                    await self._release_unused()
        finally:
            self._task = None
        self._notify()

    @property
    def _wants_to_run(self) -> bool:
        waits = self._hosting.ending or self._hosting.held or self._is_deleted
        return self.state == "running" and not waits

    async def _execute(self) -> None:
        """Execute the run once, to its end or until it is stopped, and save how it ended."""
        execution = self._execution = Execution(RunSummary(self.root, Counters()))
        error: str | None = None
        asked_again = bool(self.record.retry)
        try:
            self.record.figures = await asyncio.to_thread(recounted, self.root, self.record.figures)
            await asyncio.to_thread(self._hosting.epoch.check)  # it would take the run from a newer daemon
            summary = await run_in_loop(await self._request(execution), execution.summary)
            if summary.too_many_rejects or not execution.is_stopped:
                error = summary.stopped
        except StreamsynError as raised:
            error = str(raised)
        except Exception as bug:
            log.exception("run.bug", bug=repr(bug))
            error = f"internal error: {bug!r}"
        async with self._changing:
            self.record.figures = await self._final_figures(after_retry=asked_again)
            self._execution = None
            if error is not None:
                log.error("run.failed", error=error)
                self._state.failed(message(error))
            elif execution.summary.stopped is None:
                self._state.finished()
            try:
                await self._save()
            except StreamsynError as raised:  # the disk is full, for example
                log.error("run.not_saved", error=str(raised))  # noqa: TRY400 - expected
                self._state.failed(message(str(raised)))

    async def _final_figures(self, *, after_retry: bool) -> Figures:
        """The totals at the end of an execution."""
        figures = self._figures()
        if not after_retry:
            return figures
        try:
            return await asyncio.to_thread(recounted, self.root, figures, after_retry=True)
        except SinkError as error:
            log.warning("run.not_recounted", error=str(error))
            return figures

    async def _request(self, execution: Execution) -> RunRequest:
        loop = asyncio.get_running_loop()

        def on_rows(kind: str, rows: int) -> None:
            execution.rows[kind] = rows
            self.tails.on_rows(kind, rows)
            loop.call_soon_threadsafe(self._notify)

        return RunRequest(
            config=await self.config(),
            out=self.root,
            environ=self._hosting.environ,
            connect=self._hosting.connect,
            servers=self._hosting.servers,
            tracer=self._hosting.tracer,
            weight=self.record.weight,
            priority=self.record.priority,
            inbox=await self.inbox(),
            show_progress=False,
            preflight=False,
            retry=tuple(map(RejectReason, self.record.retry)),
            on_rows=on_rows,
            handles_signals=False,
            control=execution.control,
            on_begun=self._begun,
        )

    def _begun(self) -> None:
        """The log has what is to be asked again: a restart need not say so once more."""
        if self.record.retry:
            self._hosting.tasks.start(self._forget_retry(self.record.retry), name=f"retry of {self.id}")

    async def _forget_retry(self, begun: list[str]) -> None:
        async with self._changing:
            if self.record.retry == begun:
                self.record.retry = []
                await self._save()

    def _config(self) -> Config:
        record = self.record
        given = record.given.get("config") or {}
        templates = template_layer(self.root, record.given.get("templates") or {})
        operators = self._hosting.config
        layers = [record.shaping, given, templates]
        if (mirror := operators.sink.mirror) is not None:  # a folder of it for each run
            place = f"{mirror.rstrip('/')}/{self.root.parent.name}/{self.id}"
            layers.append({"sink": {"mirror": place}})
        return run_config(operators, *layers)

    def _open_inbox(self) -> Inbox:
        config = self._config()
        documents = load_recipe(config.recipe, config.checks).takes_documents
        epoch = self._hosting.epoch
        inbox = Inbox(self.root, config.seeds, takes_documents=documents, fence=epoch)
        inbox.open()
        return inbox

    def _figures(self) -> Figures:
        """The totals now."""
        before = self.record.figures
        return before if self._execution is None else self._execution.figures(before, self.rows)
