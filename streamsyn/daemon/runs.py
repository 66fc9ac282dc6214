"""All runs below one folder of ROOT: created, found, listed, deleted, and taken up when the daemon starts.

Of runs that have ended only a few words are kept in memory; the rest is read from disk when somebody asks.
"""

import asyncio
import shutil
import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4
from weakref import WeakValueDictionary

import structlog

from streamsyn.daemon.execution import Hosting
from streamsyn.daemon.hosted_run import HostedRun
from streamsyn.daemon.problems import Problem
from streamsyn.daemon.run_record import ENDED, SERVICE_FILE, RunRecord, State
from streamsyn.errors import StreamsynError
from streamsyn.io.durable import disk_errors, make_folder, write_whole

log = structlog.get_logger()

_DELETED: Final = ".deleted-"
"""Beginning of the names of directories that are being removed; no id begins with a dot."""


@dataclass(frozen=True, slots=True, order=True)
class Listed:
    """What is kept in memory of each run; ordered by age."""

    created_at: float
    id: str
    state: State


class Runs:
    """The runs below one folder. For the daemon's event loop.

    Args:
        folder: ROOT/runs, for example.
        hosting: What all runs share.
        what: What one is called in messages.
    """

    def __init__(self, folder: Path, hosting: Hosting, what: str = "run") -> None:
        self.folder = folder
        self._hosting = hosting
        self._what = what
        self._listed: dict[str, Listed] = {}
        self._by_age: list[Listed] = []
        self._active: dict[str, HostedRun] = {}
        """Runs that have not ended."""
        self._known: WeakValueDictionary[str, HostedRun] = WeakValueDictionary()
        """Runs that anybody holds, so that there is one object of each."""
        self._creating = asyncio.Lock()
        self._loading = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._listed)

    @property
    def ids(self) -> list[str]:
        """The ids of all runs, oldest first."""
        return [listed.id for listed in self._by_age]

    @property
    def active(self) -> list[HostedRun]:
        """The runs that have not ended: all but those that are finished or failed."""
        return list(self._active.values())

    def by_state(self) -> dict[State, int]:
        """The number of runs in each state."""
        return dict(Counter(listed.state for listed in self._by_age))

    async def open(self) -> None:
        """Find the runs on disk, and begin to execute those that were running."""
        for listed, record in await asyncio.to_thread(list, self._found()):
            self._list(listed)
            if record is not None:
                self._active[record.id] = self._hosted(record)
        for run in self.active:
            await run.load()
            await run.count_seeds()
            run.start()

    async def create(
        self, record: RunRecord, files: Mapping[str, str], check: Callable[[Path], None]
    ) -> tuple[HostedRun, bool]:
        """Create a run and begin to execute it.

        The same request again returns the run.

        Args:
            record: Its record.
            files: Texts of further files, by their path below the run directory.
            check: Called in a thread with the run directory, which has these files; raises a ConfigError if
                the run cannot work.

        Returns:
            The run, and whether it is new.

        Raises:
            Problem: 409: there is a run with this id that was created by a different request.
            ConfigError: As `check`; there is no run then.
            SinkError: The disk failed.
        """
        async with self._creating:
            if record.id in self._listed:
                run = await self.get(record.id)
                if run.record.given != record.given:
                    raise Problem(
                        409, f"there is a {self._what} {record.id!r} already, created by a different request"
                    )
                return run, False
            await asyncio.to_thread(_create, self.folder / record.id, record, files, check)
            run = self._hosted(record)
            self._on_state(run)
        run.start()
        return run, True

    async def get(self, run_id: str) -> HostedRun:
        """Return a run.

        Raises:
            Problem: 404: there is none with this id.
            SinkError: Its record cannot be read.
        """
        if (run := self._known.get(run_id)) is not None:
            return run
        if run_id not in self._listed:
            raise Problem(404, f"there is no {self._what} {run_id[:100]!r}")
        async with self._loading:
            if (run := self._known.get(run_id)) is None:
                record = await asyncio.to_thread(RunRecord.load, self.folder / run_id)
                if record is None or run_id not in self._listed:
                    raise Problem(404, f"there is no {self._what} {run_id!r}")
                run = self._hosted(record)
                await run.load()
        return run

    async def page(
        self, *, state: str | None, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]:
        """Return runs as the API shows them, newest first, and whether there are more.

        Args:
            state: Only runs in this state.
            after: The id of the last run of the page before; unknown ones are refused.
            limit: Maximum number.

        Raises:
            Problem: 404: there is no run with the id `after`.
        """
        if after is not None and after not in self._listed:
            raise Problem(404, f"after: there is no {self._what} {after[:100]!r}")
        before = None if after is None else self._listed[after]
        wanted = [
            listed.id
            for listed in reversed(self._by_age)
            if (before is None or (listed.created_at, listed.id) < (before.created_at, before.id))
            and (state is None or listed.state == state)
        ]
        found = []
        for run_id in wanted[:limit]:
            try:
                found.append((await self.get(run_id)).as_json())
            except Problem:
                continue  # deleted meanwhile
        return found, len(wanted) > limit

    async def delete(self, run_id: str, *, force: bool) -> None:
        """Remove a run and its directory.

        Raises:
            Problem: 404: there is none with this id.
            Refused: It has work to do, and `force` is not given.
        """
        run = await self.get(run_id)
        await run.delete(force=force)
        aside = self.folder / f"{_DELETED}{run_id}-{uuid4().hex[:8]}"
        async with self._creating:  # a new run may have this id as soon as the directory is gone
            if self._known.get(run_id) is not run:  # a request at the same time has deleted it
                raise Problem(404, f"there is no {self._what} {run_id!r}")
            with disk_errors(f"delete {run.root}"):
                await asyncio.to_thread(run.root.rename, aside)
            self._forget(run_id)
        await asyncio.to_thread(shutil.rmtree, aside, ignore_errors=True)

    async def stop(self, why: str, timeout_s: float) -> None:
        """Drain all runs that are executed, for at most `timeout_s` seconds; then stop them at once."""
        stopping = [run for run in self.active if run.is_executed]
        try:
            async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as group:
                for run in stopping:
                    group.create_task(run.stop(why), name=f"stop {run.id}")
        except TimeoutError:
            async with asyncio.TaskGroup() as group:
                for run in stopping:
                    group.create_task(run.stop(why, at_once=True), name=f"stop {run.id}")
        for run in list(self._known.values()):
            await run.release()

    def _hosted(self, record: RunRecord) -> HostedRun:
        run = HostedRun(self.folder / record.id, record, self._hosting, self._on_state)
        self._known[run.id] = run
        return run

    def _on_state(self, run: HostedRun) -> None:
        """Keep the list and the set of active runs in step with a run's state."""
        self._list(Listed(run.record.created_at, run.id, run.state))
        self._known[run.id] = run
        if run.state in ENDED:
            self._active.pop(run.id, None)
        else:
            self._active[run.id] = run

    def _list(self, listed: Listed) -> None:
        if self._listed.get(listed.id) != listed:
            self._forget(listed.id)
            self._listed[listed.id] = listed
            insort(self._by_age, listed)

    def _forget(self, run_id: str) -> None:
        self._active.pop(run_id, None)
        self._known.pop(run_id, None)
        listed = self._listed.pop(run_id, None)
        if listed is not None:
            del self._by_age[bisect_left(self._by_age, listed)]

    def _found(self) -> Iterator[tuple[Listed, RunRecord | None]]:
        """The runs on disk; those that have ended without their record. Blocks on the disk.

        What cannot be read is logged and left alone.
        """
        with disk_errors(f"read {self.folder}"):
            make_folder(self.folder)
            paths = sorted(self.folder.iterdir())
        for path in paths:
            if path.name.startswith(_DELETED):
                shutil.rmtree(path, ignore_errors=True)
                continue
            if (ended := RunRecord.has_ended(path)) is not None:
                yield Listed(ended[0], path.name, ended[1]), None
                continue
            try:
                record = RunRecord.load(path)
            except StreamsynError as error:
                log.error("runs.unreadable", error=str(error))  # noqa: TRY400 - expected
                continue
            if record is not None and record.id == path.name:
                listed = Listed(record.created_at, record.id, record.state)
                yield listed, None if record.state in ENDED else record
            elif record is not None:
                log.error("runs.misplaced", path=str(path), id=record.id)


def new_id() -> str:
    """Return an id for a run whose creator chose none: sorted by time, and never given twice."""
    return f"run-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid4().hex[:8]}"


def _create(root: Path, record: RunRecord, files: Mapping[str, str], check: Callable[[Path], None]) -> None:
    """Make the directory of a run; it exists for the daemon once it has its record."""
    if any((root / name).exists() for name in (SERVICE_FILE, "run.json", "spool")):
        why = "is a directory with a run that the daemon cannot read; its log says why"
        raise Problem(409, f"{root.name!r} {why}: move it away")
    try:
        with disk_errors(f"create {root}"):
            make_folder(root)
            for name, text in files.items():
                make_folder((root / name).parent)
                write_whole(root / name, text.encode())
        check(root)
        record.save(root)
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise
