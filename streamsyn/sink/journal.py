"""Finished steps of unfinished drafts, so that a kill in the middle of a long document costs one step.

It lies beside the log, in OUT/journal.sqlite, and is no part of it: whatever is wrong with it, its steps
are merely asked again. Only drafts in flight are in it: a draft's steps are dropped once its outcome is on
disk, and the file goes when a run ends with nothing in it. Recipes of a single step never touch it.
"""

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar

import orjson
import structlog

from streamsyn.io.derived import SQLITE_ERRORS, is_of_the_disk
from streamsyn.records import Attempt, Completion, Request, digest

log = structlog.get_logger()

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """What was asked, by its digest, what was answered, and the tries that it took."""

    request_digest: bytes
    completion: Completion
    attempts: list[Attempt]


def request_digest(request: Request) -> bytes:
    """16 bytes that stand for what is asked, wherever it is asked."""
    return digest(orjson.dumps([request.messages, request.sampling], option=orjson.OPT_SORT_KEYS))


class Journal:
    """Steps by the key of their draft. For any number of threads; `holds` alone never blocks.

    Nothing here raises: a damaged file is removed, and when the disk fails no more steps are kept. Either
    is said once in the log. What has been added survives a kill of this process (SQLite's write-ahead log,
    not synced: a loss of power may cost the last steps).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        self._db: sqlite3.Connection | None = None
        self._held: set[bytes] = set()
        self._is_off = False
        if path.exists():
            self._do(self._load, None)

    def holds(self, key: bytes) -> bool:
        """Whether there are steps of this draft."""
        return key in self._held

    def keys(self) -> list[bytes]:
        """Drafts that there are steps of."""
        return list(self._held)

    def steps(self, key: bytes) -> list[FinishedStep]:
        """The finished steps of a draft, from the first up to the first that is missing or damaged."""
        if key not in self._held:
            return []
        return self._do(lambda db: _steps(db, key), [])

    def add(self, key: bytes, step: int, asked: bytes, answer: Completion, tries: Sequence[Attempt]) -> bool:
        """Keep a finished step, in place of it and of all behind it; whether that worked.

        Args:
            key: That of the draft.
            step: Its number, from 0.
            asked: The digest of the request.
            answer: What came of it.
            tries: What it took.
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
        """Forget drafts, which have an outcome."""
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
        """Let go of the file; with `remove_empty` remove it if nothing is in it."""
        with self._lock:
            self._close()
            if remove_empty and not self._held:
                self._remove()

    def _do(self, act: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """What `act` gives, or `otherwise` when the file is at fault; a damaged one is removed."""
        with self._lock:
            if self._is_off:
                return otherwise
            try:
                return act(self._open())
            except SQLITE_ERRORS as error:
                if is_of_the_disk(error):
                    self._is_off = True
                    log.warning("journal.off", path=str(self.path), why=str(error), then="no step is kept")
                else:
                    log.warning("journal.damaged", path=str(self.path), why=str(error), then="removed")
                    self._close()
                    self._remove()
            return otherwise

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            self._db = db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA auto_vacuum = FULL")  # counts before the first table: the file shrinks again
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(
                "CREATE TABLE IF NOT EXISTS steps (key BLOB, step INTEGER, asked BLOB, body BLOB, sum BLOB, "
                "PRIMARY KEY (key, step))"
            )
        return self._db

    def _load(self, db: sqlite3.Connection) -> None:
        keys = (key for (key,) in db.execute("SELECT DISTINCT key FROM steps"))
        self._held = {key for key in keys if isinstance(key, bytes)}

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _remove(self) -> None:
        self._held = set()
        try:
            for part in self.path.parent.glob(self.path.name + "*"):
                part.unlink(missing_ok=True)
        except OSError as error:
            self._is_off = True
            log.warning("journal.off", path=str(self.path), why=str(error), then="no step is kept")


def _steps(db: sqlite3.Connection, key: bytes) -> list[FinishedStep]:
    steps: list[FinishedStep] = []
    query = "SELECT step, asked, body, sum FROM steps WHERE key = ? ORDER BY step"
    with closing(db.execute(query, (key,))) as found:
        for step, asked, body, said in found:
            is_whole = isinstance(asked, bytes) and isinstance(body, bytes)
            if step != len(steps) or not is_whole or _check(key, step, asked, body) != said:
                break
            try:
                completion, attempts = orjson.loads(body)
                tries = [Attempt(**attempt) for attempt in attempts]
                completion["logprobs"] = tuple(completion.get("logprobs", ()))
                steps.append(FinishedStep(asked, Completion(**completion), tries))
            except (TypeError, ValueError):  # another version's
                break
    return steps


def _check(key: bytes, step: int, asked: bytes, body: bytes) -> bytes:
    """SQLite notices a damaged page only where its structure suffers; this notices it in the text."""
    return digest(key, str(step), asked, body)
