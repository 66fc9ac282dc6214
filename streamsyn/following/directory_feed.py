"""Batches of rows of a run directory, waited for."""

import math
from pathlib import Path
from typing import Final

import structlog

from streamsyn.background import finished_in_thread
from streamsyn.errors import ConfigError
from streamsyn.following.feed import Batch, check_after
from streamsyn.following.folder_watch import FolderWatch
from streamsyn.following.run_rows import RunRows
from streamsyn.sink.rundir import LOCK_NAME

log = structlog.get_logger()

_NO_LIMIT: Final = 2**62
"""Rows: the size of a batch is limited by its bytes."""


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

    def read(self, first: int) -> Batch | None:
        while (batch := self._look(first)) is not None and not batch:
            self._watch.wait(math.inf)
        return batch

    async def aread(self, first: int) -> Batch | None:
        while (batch := await finished_in_thread(self._look, first)) is not None and not batch:
            await self._watch.changed(math.inf)
        return batch

    def close(self) -> None:
        self._watch.close()

    def _look(self, first: int) -> Batch | None:
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
