"""Finished steps of unfinished drafts, so that a kill in the middle of a long document costs one step.

The journal, OUT/journal.sqlite, is not part of the log: if it is lost or damaged, its steps are requested
again. It holds only drafts in flight: the steps of a draft are dropped once its outcome is on disk, and the
file is removed when a run ends with nothing in it. A recipe of a single step opens it only where servers
score its answers: such an answer is kept until its outcome is.
"""

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Final, TypeVar

import orjson
import structlog

from streamsyn.io.derived import SQLITE_ERRORS, DerivedDatabase
from streamsyn.records import Attempt, Completion, Request, digest

log = structlog.get_logger()

T = TypeVar("T")

_TABLE: Final = """
CREATE TABLE IF NOT EXISTS steps (key BLOB, step INTEGER, asked BLOB, body BLOB, sum BLOB,
    PRIMARY KEY (key, step));
"""


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """The digest of a request, its completion, and the attempts that it took."""

    request_digest: bytes
    completion: Completion
    attempts: list[Attempt]


def request_digest(request: Request) -> bytes:
    """16 bytes that identify the messages and the sampling of a request, whichever server it goes to."""
    return digest(orjson.dumps([request.messages, request.sampling], option=orjson.OPT_SORT_KEYS))


class Journal:
    """Steps by the key of their draft. Any number of threads may use it; only `holds` and `keys` never block.

    Nothing here raises: a damaged file is removed, and when the disk fails no more steps are kept. Either
    is logged. What has been added survives a kill of this process; a loss of power may cost the last steps.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        # `auto_vacuum` makes the file shrink when steps are dropped.
        self._file = DerivedDatabase(path, _TABLE, pragmas=["auto_vacuum = FULL"])
        self._held: set[bytes] = set()
        self._is_off = False
        try:
            exists = path.exists()
        except OSError as error:
            self._switch_off(error)
        else:
            if exists:
                self._do(self._load, None)

    def holds(self, key: bytes) -> bool:
        """Whether steps of this draft are kept."""
        return key in self._held

    def keys(self) -> list[bytes]:
        """The keys of all drafts of which steps are kept."""
        return list(self._held)

    def steps(self, key: bytes) -> list[FinishedStep]:
        """The finished steps of a draft, up to the first one that is missing or damaged."""
        if key not in self._held:
            return []
        return self._do(lambda db: _steps(db, key), [])

    def add(self, key: bytes, step: int, asked: bytes, answer: Completion, tries: Sequence[Attempt]) -> bool:
        """Keep a finished step; it replaces the same step and all later ones of the draft.

        Args:
            key: The key of the draft.
            step: The number of the step, from 0.
            asked: The digest of the request.
            answer: The completion.
            tries: The attempts that it took.

        Returns:
            Whether the step is on disk.
        """
        body = orjson.dumps([answer, tries])
        row = (key, step, asked, body, _check(key, step, asked, body))

        def add(db: sqlite3.Connection) -> bool:
            with db:
                db.execute("BEGIN IMMEDIATE")
                db.execute("DELETE FROM steps WHERE key = ? AND step >= ?", (key, step))
                db.execute("INSERT INTO steps VALUES (?, ?, ?, ?, ?)", row)
            self._held.add(key)
            return True

        return self._do(add, False)

    def drop(self, keys: Iterable[bytes]) -> None:
        """Remove the steps of drafts that have an outcome."""
        held = [key for key in keys if key in self._held]
        if not held:
            return

        def drop(db: sqlite3.Connection) -> None:
            with db:
                db.execute("BEGIN IMMEDIATE")
                db.executemany("DELETE FROM steps WHERE key = ?", ((key,) for key in held))
            self._held.difference_update(held)

        self._do(drop, None)

    def close(self, *, remove_empty: bool = False) -> None:
        """Close the file; with `remove_empty`, delete it if no steps are in it."""
        with self._lock:
            self._file.close()
            if remove_empty and not self._held:
                try:
                    self._file.delete()
                except OSError as error:
                    self._switch_off(error)

    def _do(self, act: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """What `act` returns, or `otherwise` if the file fails; a damaged one is removed."""
        with self._lock:
            if self._is_off:
                return otherwise
            try:
                return act(self._file.connect())
            except (*SQLITE_ERRORS, OSError) as error:
                self._recover(error)
            return otherwise

    def _recover(self, error: Exception) -> None:
        try:
            self._file.discard(error)
        except (*SQLITE_ERRORS, OSError) as failure:
            self._switch_off(failure)
        else:
            self._held = set()
            log.warning("journal.damaged", path=str(self.path), why=str(error), then="removed")

    def _switch_off(self, error: Exception) -> None:
        self._is_off = True
        log.warning("journal.off", path=str(self.path), why=str(error), then="no step is kept")

    def _load(self, db: sqlite3.Connection) -> None:
        keys = (key for (key,) in db.execute("SELECT DISTINCT key FROM steps"))
        self._held = {key for key in keys if isinstance(key, bytes)}


def _steps(db: sqlite3.Connection, key: bytes) -> list[FinishedStep]:
    steps: list[FinishedStep] = []
    query = "SELECT step, asked, body, sum FROM steps WHERE key = ? ORDER BY step"
    with closing(db.execute(query, (key,))) as found:
        for step, asked, body, checksum in found:
            is_whole = isinstance(asked, bytes) and isinstance(body, bytes)
            if step != len(steps) or not is_whole or _check(key, step, asked, body) != checksum:
                break
            try:
                completion, attempts = orjson.loads(body)
                tries = [Attempt(**attempt) for attempt in attempts]
                completion["logprobs"] = tuple(completion.get("logprobs", ()))
                steps.append(FinishedStep(asked, Completion(**completion), tries))
            except (TypeError, ValueError):  # written by another version
                break
    return steps


def _check(key: bytes, step: int, asked: bytes, body: bytes) -> bytes:
    """A checksum: SQLite notices damage to the structure of a page, but not to the text in it."""
    return digest(key, str(step), asked, body)
