"""Each call that reaches the disk fails once: the log raises a SinkError, and can be opened again."""

import errno
import io
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from streamsyn.errors import SinkError
from streamsyn.sink.log import RunLog
from tests.builders import context, new_run, opened, outcome, rows, sample, sink

REAL_CONNECT = sqlite3.connect


class Disk:
    """Counts the calls that reach the disk; call number `fails_at` fails, and those after it."""

    def __init__(self) -> None:
        self.calls = 0
        self.fails_at = 10**9

    def count(self, error: Exception) -> None:
        self.calls += 1
        if self.calls >= self.fails_at:
            raise error

    def faulty(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.count(OSError(errno.EIO, "Input/output error"))
            return call(*args, **options)

        return counted

    def connect(self, *args: Any, **options: Any) -> sqlite3.Connection:
        disk = self

        class Connection(sqlite3.Connection):
            def execute(self, *args: Any) -> sqlite3.Cursor:
                disk.count(sqlite_error())
                return super().execute(*args)

            def executemany(self, *args: Any) -> sqlite3.Cursor:
                disk.count(sqlite_error())
                return super().executemany(*args)

        return REAL_CONNECT(*args, factory=Connection, **options)


def sqlite_error() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR
    return error


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """The disk of this process, sound as yet."""
    made = Disk()
    for name in ("open", "fsync", "write", "ftruncate", "truncate", "rename", "replace", "unlink", "stat"):
        monkeypatch.setattr(os, name, made.faulty(getattr(os, name)))
    monkeypatch.setattr(io, "open", made.faulty(io.open))
    monkeypatch.setattr(sqlite3, "connect", made.connect)
    return made


def write(root: Path) -> None:
    """All that a run does to its log, twice: the second finds what the first left."""
    for first in (0, 12):
        run_log = RunLog(root, sink(shard_bytes=1500))
        try:
            with closing(run_log.claims()) as claims, claims.batch():
                claims.claim(b"%016d" % first)
            run_log.append([outcome(number) for number in range(first, first + 12)])
            run_log.sync()
            assert len(list(run_log.read_contexts(0, run_log.contexts.rows))) == run_log.contexts.rows
            run_log.samples.append([sample(number) for number in range(first, first + 12)])
            run_log.save_state({"consumed": 1})
            list(run_log.read_sample_lines())
            if first:
                run_log.seal_outcomes()
                run_log.finish()
        except BaseException:
            run_log.close(quietly=True)
            raise
        run_log.close()


def test_every_fault_is_a_sink_error(tmp_path: Path, disk: Disk) -> None:
    """One line for the user, wherever the disk fails; once it works again so does the log."""
    write(new_run(tmp_path / "sound"))
    calls = disk.calls
    for number in range(1, calls, 3):
        root = new_run(tmp_path / str(number))
        disk.calls, disk.fails_at = 0, number
        with suppress(SinkError):  # some faults cost only what can be made again
            write(root)
        disk.fails_at = 10**9
        with opened(root, sink()) as run_log:
            run_log.append([context(100)])
        seqs = [row["seq"] for row in rows(root, "contexts")]
        assert list(range(len(seqs))) == seqs
