"""Batches of OpenAI's Batch API: each is a run of the recipe `chat`, with an input and an output file.

ROOT/batches/ID/batch.json    what clients are told of it
ROOT/batches/ID/input.jsonl   a link to its input file until it has ended, so that the file may be deleted
ROOT/batches/ID/...           its run directory

validating -> in_progress -> finalizing -> completed | expired
     |              |
     |              +-> cancelling -> cancelled
     +-> failed
"""

import asyncio
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import structlog

from streamsyn.background import finished_in_thread
from streamsyn.daemon.batch_files import CANCELLED, EXPIRED, BatchOutput, InputCheck, submit
from streamsyn.daemon.batch_record import ENDED, BatchRecord, Status
from streamsyn.daemon.execution import Hosting
from streamsyn.daemon.hosted_run import HostedRun
from streamsyn.daemon.problems import Problem
from streamsyn.daemon.run_config import run_config, shaping_tree
from streamsyn.daemon.run_record import Refused, RunRecord
from streamsyn.daemon.runs import Runs
from streamsyn.daemon.stored_files import Files
from streamsyn.daemon.webhook_target import Webhook
from streamsyn.errors import StreamsynError
from streamsyn.io.durable import disk_errors, make_folder
from streamsyn.plain_text import message

log = structlog.get_logger()

_INPUT: Final = "input.jsonl"
_ANNOUNCED: Final = frozenset({"id", "request_counts", "output_file_id", "error_file_id", "metadata"})
"""What an event tells of a batch."""


class Batch:
    """One batch. For the daemon's event loop.

    Args:
        record: What clients are told of it.
        root: Its directory.
        runs: The runs of batches.
        files: The files.
        hosting: What all runs share.
        on_change: Called when its status or its counts have changed.
    """

    def __init__(
        self,
        record: BatchRecord,
        root: Path,
        runs: Runs,
        files: Files,
        hosting: Hosting,
        on_change: Callable[[], None],
    ) -> None:
        self.record = record
        self.root = root
        self._runs = runs
        self._files = files
        self._hosting = hosting
        self._on_change = on_change
        self._saving = asyncio.Lock()

    async def work(self) -> None:
        """Bring the batch to its end, from wherever it is. No error of it leaves this."""
        structlog.contextvars.clear_contextvars()  # of the request that started it
        structlog.contextvars.bind_contextvars(batch=self.record.id)
        try:
            run = await self._begin()
            if run is not None:
                await self._follow(run)
        except StreamsynError as error:
            await self._fail([_error("server_error", str(error))])
        except Exception as bug:
            log.exception("batch.bug", bug=repr(bug))
            await self._fail([_error("server_error", f"internal error: {bug!r}")])

    async def cancel(self) -> None:
        """Finish what is in flight, and end. What is done is kept."""
        if self.record.status not in {"validating", "in_progress"}:
            return
        was_checked = self.record.status == "in_progress"
        await self._reached("cancelling")
        if was_checked:
            await self._drain(await self._runs.get(self.record.id))

    async def _begin(self) -> HostedRun | None:
        """Check the input and hand it to a run, if that is not done yet; None if there is nothing to run."""
        record, run = self.record, None
        if record.status == "validating":
            config = self._hosting.config
            limit = min(config.seeds.max_line_bytes, config.serve.max_line_bytes)
            check = await asyncio.to_thread(InputCheck().run, self.root / _INPUT, limit)
            if errors := check.errors or self._model_errors(check.model):
                await self._fail(errors)
                return None
            record.total, record.model = check.total, check.model
        if record.status == "validating":  # it was not cancelled meanwhile
            run = await self._handed_over()
        elif (run := await self._existing_run()) is None:
            await self._end("cancelled")
            return None
        if record.output_file_id is None:
            file_id = f"file-{record.id.removeprefix('batch_')}-output"
            await self._make_file(file_id, "output")
            record.output_file_id = file_id
            await self._save()
        if record.status == "validating":
            await self._reached("in_progress")
        if record.status == "cancelling":
            await self._drain(run)
        return run

    async def _existing_run(self) -> HostedRun | None:
        try:
            return await self._runs.get(self.record.id)
        except Problem as problem:
            if problem.status != 404:
                raise
            return None

    def _model_errors(self, model: str) -> list[dict[str, Any]]:
        why = self._hosting.servers.why_not_served(model)
        return [] if why is None else [_error("model_not_found", why, "body.model")]

    async def _handed_over(self) -> HostedRun:
        """The run of the batch, with all requests in its inbox, which is closed."""
        record = self.record
        given = {"config": _run_keys(record.model or "")}
        config = await asyncio.to_thread(run_config, self._hosting.config, given["config"])
        made = RunRecord(
            id=record.id,
            created_at=record.created_at,
            priority=record.priority,
            given=given,
            shaping=shaping_tree(config),
        )
        run, _ = await self._runs.create(made, {}, lambda _: None)
        inbox = await run.inbox()
        if not inbox.closed:  # after a kill in between, what is there already is a duplicate
            await finished_in_thread(submit, self.root / _INPUT, inbox)
            await run.close()
        return run

    async def _follow(self, run: HostedRun) -> None:
        """Write outcomes to the files as they come, until the run has ended."""
        output = BatchOutput(self.root)
        try:
            await self._open(output)
            while True:
                seen = run.rows, run.state, run.is_executed
                await self._write(output, run.rows)
                if seen != (run.rows, run.state, run.is_executed):
                    continue
                if run.state not in {"running", "paused"} and not run.is_executed:
                    break
                await self._changed(run)
            # A run that was stopped and then killed does not know what it had written.
            await self._write(output, await finished_in_thread(output.rows_in_log))
            if run.state == "failed":
                error = _error("server_error", run.as_json()["error"] or "the run failed")
                await self._fail(self._model_errors(self.record.model or "") or [error])
                return
            status: Status = "completed"
            if run.state != "finished":
                status = "cancelled" if self.record.status == "cancelling" else "expired"
                await self._note_never_sent(output, CANCELLED if status == "cancelled" else EXPIRED)
            if self.record.status == "in_progress":
                await self._reached("finalizing")
        finally:
            await finished_in_thread(output.close)
        await self._end(status)

    async def _changed(self, run: HostedRun) -> None:
        """Wait for a change of the run; a batch that expires meanwhile is drained."""
        expires_at = self.record.expires_at
        if expires_at is None or run.state != "running":
            await run.changed()
            return
        try:
            async with asyncio.timeout(max(0.0, expires_at - time.time())):
                await run.changed()
        except TimeoutError:
            await self._drain(run)

    async def _drain(self, run: HostedRun) -> None:
        with suppress(Refused):  # it has ended just now
            await run.drain()

    async def _open(self, output: BatchOutput) -> None:
        record = self.record
        for file_id, opened in (
            (record.output_file_id, output.open_output),
            (record.error_file_id, output.open_errors),
        ):
            if file_id is not None:
                await finished_in_thread(opened, self._files.content_path(file_id))
        self._note_sizes(output)

    async def _write(self, output: BatchOutput, rows: dict[str, int]) -> None:
        if rows["rejects"]:
            await self._make_error_file(output)
        try:
            await finished_in_thread(output.catch_up, rows["contexts"], rows["rejects"])
        finally:
            self._note_sizes(output)

    async def _note_never_sent(self, output: BatchOutput, code: str) -> None:
        """Have the error file say which requests were not sent."""
        if self.record.completed + self.record.failed < self.record.total:
            await self._make_error_file(output)
            await finished_in_thread(output.add_never_sent, self.root / _INPUT, code)
            self._note_sizes(output)

    async def _make_error_file(self, output: BatchOutput) -> None:
        if self.record.error_file_id is not None:
            return
        file_id = f"file-{self.record.id.removeprefix('batch_')}-error"
        await self._make_file(file_id, "error")
        await finished_in_thread(output.open_errors, self._files.content_path(file_id))
        self.record.error_file_id = file_id
        await self._save()

    async def _make_file(self, file_id: str, what: str) -> None:
        await self._files.make_output(file_id, f"{self.record.id}_{what}.jsonl")

    def _note_sizes(self, output: BatchOutput) -> None:
        record = self.record
        record.completed, record.failed = output.answers, output.failures
        for file_id, size in (
            (record.output_file_id, output.output_bytes),
            (record.error_file_id, output.error_bytes),
        ):
            file = None if file_id is None else self._files.get(file_id)
            if file is not None:
                file.bytes = size
        self._on_change()

    async def _fail(self, errors: Sequence[dict[str, Any]]) -> None:
        log.error("batch.failed", error=errors[0]["message"], errors=len(errors))
        self.record.errors = list(errors)
        try:
            await self._end("failed")
        except StreamsynError as error:  # the disk is full, for example; it is tried again at the next start
            log.error("batch.not_saved", error=str(error))  # noqa: TRY400 - expected

    async def _end(self, status: Status) -> None:
        await self._reached(status)
        await asyncio.to_thread((self.root / _INPUT).unlink, missing_ok=True)

    async def _reached(self, status: Status) -> None:
        if status in ENDED:
            webhook = await asyncio.to_thread(Webhook.load, self.root, "batch")
            told = {name: value for name, value in self.record.as_json().items() if name in _ANNOUNCED}
            data = told | {"status": status}
            await self._hosting.webhooks.announce(webhook, f"batch.{status}", 0, data)
        self.record.reached(status)
        await self._save()
        log.info("batch.status", batch=self.record.id, status=status)
        self._on_change()

    async def _save(self) -> None:
        async with self._saving:
            await finished_in_thread(self.record.save, self.root)


class Batches:
    """All batches. For the daemon's event loop; `open` first.

    Args:
        folder: ROOT/batches.
        files: The files.
        hosting: What all runs share.

    Attributes:
        runs: The runs of the batches.
        change: Set at the next change of a status or of counts, and replaced then.
    """

    def __init__(self, folder: Path, files: Files, hosting: Hosting) -> None:
        self.folder = folder
        self.runs = Runs(folder, hosting, "batch")
        self._files = files
        self._hosting = hosting
        self.change = asyncio.Event()
        self._records: dict[str, BatchRecord] = {}
        self._active: dict[str, Batch] = {}

    async def open(self) -> None:
        """Find the batches on disk, and take up those that have not ended.

        Raises:
            SinkError: The directory cannot be used.
        """
        await self.runs.open()
        for record in await asyncio.to_thread(list, self._found()):
            self._records[record.id] = record
            if not record.has_ended:
                self._start(record)

    def get(self, batch_id: str) -> BatchRecord | None:
        """Return what is known of a batch; None if there is none with this id."""
        return self._records.get(batch_id)

    def newest_first(self) -> list[BatchRecord]:
        """Return all batches."""
        return list(self._records.values())[::-1]

    def by_status(self) -> Counter[Status]:
        """Return the number of batches in each status."""
        return Counter(record.status for record in self._records.values())

    def is_using(self, file_id: str) -> bool:
        """Whether a batch that has not ended writes this file."""
        return any(
            file_id in {batch.record.output_file_id, batch.record.error_file_id}
            for batch in self._active.values()
            if not batch.record.has_ended
        )

    async def create(self, record: BatchRecord, webhook: Webhook | None = None) -> None:
        """Begin a batch; on return it survives a kill.

        Args:
            record: What is known of it.
            webhook: Where its events are sent.

        Raises:
            SinkError: The disk failed.
        """
        source, root = self._files.content_path(record.input_file_id), self.folder / record.id
        await finished_in_thread(_link, source, root / _INPUT)
        if webhook is not None:
            await finished_in_thread(webhook.save, root, "batch")
        await finished_in_thread(record.save, root)
        self._records[record.id] = record
        self._start(record)

    async def cancel(self, batch_id: str) -> None:
        """Cancel a batch that has not ended."""
        if (batch := self._active.get(batch_id)) is not None:
            await batch.cancel()

    async def delete(self, batch_id: str) -> None:
        """Remove a batch that has ended, with its run; its files stay.

        Raises:
            SinkError: The disk failed.
        """
        try:
            await self.runs.delete(batch_id, force=True)
        except Problem as problem:
            if problem.status != 404:
                raise
            await asyncio.to_thread(shutil.rmtree, self.folder / batch_id, ignore_errors=True)
        self._records.pop(batch_id, None)

    def _start(self, record: BatchRecord) -> None:
        batch = Batch(record, self.folder / record.id, self.runs, self._files, self._hosting, self._changed)
        self._active[record.id] = batch
        self._hosting.tasks.start(self._work(batch), name=f"batch {record.id}")

    def _changed(self) -> None:
        self.change.set()
        self.change = asyncio.Event()

    async def _work(self, batch: Batch) -> None:
        await batch.work()
        self._active.pop(batch.record.id, None)

    def _found(self) -> Iterator[BatchRecord]:
        """The batches on disk, oldest first; what cannot be read is logged and left alone."""
        found = []
        for path in self.folder.iterdir():
            try:
                record = BatchRecord.load(path)
            except StreamsynError as error:
                log.error("batches.unreadable", error=str(error))  # noqa: TRY400 - expected
                continue
            if record is not None and record.id == path.name:
                found.append(record)
        yield from sorted(found, key=lambda record: (record.created_at, record.id))


def _link(source: Path, path: Path) -> None:
    """Keep the input of a batch, whatever becomes of the file."""
    with disk_errors(f"write {path}"):
        make_folder(path.parent)
        try:
            os.link(source, path)
        except PermissionError:
            raise
        except OSError:  # a file system without links
            shutil.copyfile(source, path)


def _run_keys(model: str) -> dict[str, Any]:
    """The configuration of a batch's run: none of the operator's checks and limits of texts applies."""
    return {
        "run": {"max_reject_fraction": 1},
        "seeds": {"format": "request", "limit": None},
        "recipe": {"use": "chat", "contexts_per_seed": 1, "thinking": "auto"},
        "checks": {"near_duplicate": "off", "context_gain": False, "answerable": False, "eval_sets": []},
        "fleet": {"model": model, "models": {}},
        "assembly": {"write": False},
    }


def _error(code: str, text: str, param: str | None = None) -> dict[str, Any]:
    return {"code": code, "line": None, "message": message(text), "param": param}
