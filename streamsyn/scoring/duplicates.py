"""Near-duplicates among all contexts of a run, in bounded memory: SQLite keeps what is known of them.

Each context that repeats none before it is kept as an original: 128 bytes of its MinHash signature, and its
bands. A context is compared with the originals that share a band with it. One that is a near-duplicate itself
is not added: else a chain of texts, each a little like the one before, would make a duplicate of a text that
resembles nothing that stays when duplicates are left out.

The file is derived from the log. `catch_up` adds what it lacks and takes out what never came into the log;
a missing or damaged one is made anew; when the disk fails nothing more is compared. Nothing here raises.
"""

import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy
import structlog

from streamsyn.io.derived import SQLITE_ERRORS, is_of_the_disk
from streamsyn.shingles import PERMUTATIONS, VERSION, band_keys, signature

log = structlog.get_logger()

T = TypeVar("T")

CACHE_KIB = 32 * 1024
MAX_CANDIDATES = 4096
"""Of more originals that share a band only so many are looked at, the earliest."""
_RECALL = 0.99
_MAX_ROWS = 16
_BATCH_ROWS = 500
_COMMIT_ROWS = 5000
_COMMIT_S = 10.0
"""Bands lie all over the file: the more of them are written at once, the fewer pages are written twice."""
_TABLES = """
CREATE TABLE IF NOT EXISTS originals (n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, low BLOB NOT NULL,
    logged INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS bands (key INTEGER, n INTEGER, PRIMARY KEY (key, n)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Match:
    """The earlier context that is most like another, and how much (estimated, 0..1)."""

    id: str
    similarity: float


@dataclass(frozen=True, slots=True)
class _Text:
    """What is kept of one text."""

    id: str
    keys: tuple[int, ...]
    low: bytes


class Duplicates:
    """The originals of a run. For any number of threads; all methods block.

    Args:
        path: Where the file is or is to be.
        similarity: From where on two texts are near-duplicates, 0..1; 99 % of the pairs that are just so
            alike are found, and nearly all that are more alike.
    """

    def __init__(self, path: Path, similarity: float) -> None:
        self.path = path
        self._similarity = similarity
        self._rows = _rows_of_a_band(similarity)
        self._lock = Lock()
        self._db: sqlite3.Connection | None = None
        self._is_off = False
        self._was_damaged = False
        self._uncommitted = 0
        self._committed_at = time.monotonic()
        self.next_seq = 0
        """Rows of the log before this one need not be given to `catch_up`."""
        self._do(self._load, None)

    def check_and_add(self, draft_id: str, text: str) -> Match | None:
        """The most similar original, if it is similar enough; else the text is one from now on.

        Of two similar texts that come at the same time exactly one has a match. A text takes the place of an
        earlier one with its own id: a draft that is written again does not repeat itself.
        """
        new = self._of(draft_id, text)

        def check_and_add(db: sqlite3.Connection) -> Match | None:
            self._begin(db)
            db.execute("DELETE FROM originals WHERE id = ?", (draft_id,))
            match = self._most_similar(db, new)
            if match is None:
                _insert(db, new, logged=False)
            self._commit_sometimes(db)
            return match

        return self._do(check_and_add, None)

    def forget(self, draft_id: str) -> None:
        """Take out an original that did not become a context after all."""

        def forget(db: sqlite3.Connection) -> None:
            self._begin(db)
            db.execute("DELETE FROM originals WHERE id = ?", (draft_id,))
            self._commit_sometimes(db)

        self._do(forget, None)

    def catch_up(self, rows: Iterable[dict[str, Any]]) -> bool:
        """Make this what the log says, before a run begins.

        Args:
            rows: Contexts in the log in their order, from `next_seq` or earlier to the last.

        Returns:
            False when the file proved to be damaged on the way. It is empty now: begin with row 0.
        """
        was_empty = self.next_seq == 0 and not self._was_damaged
        seen = iter(rows)
        while batch := list(islice(seen, _BATCH_ROWS)):
            fresh = [row for row in batch if row["seq"] >= self.next_seq]
            if not self._do(partial(self._add_logged, rows=fresh), False):
                return self._is_off
        if was_empty and self.next_seq:
            log.warning(
                "duplicates.rebuilt",
                path=str(self.path),
                why="missing, or of another version",
                rows=self.next_seq,
            )
        return self._do(self._drop_ghosts, False) or self._is_off

    def close(self) -> None:
        """Write what is not yet written, and let go of the file."""
        self._do(self._commit, None)
        with self._lock:
            self._close()
            self._is_off = True

    def _of(self, draft_id: str, text: str) -> _Text:
        values = signature(text).values
        return _Text(draft_id, band_keys(values, self._rows), values[::4])

    def _most_similar(self, db: sqlite3.Connection, new: _Text) -> Match | None:
        marks = ",".join("?" * len(new.keys))
        candidates = db.execute(
            "SELECT id, low FROM originals WHERE n IN "  # noqa: S608
            f"(SELECT n FROM bands WHERE key IN ({marks})) AND length(low) = ? ORDER BY n LIMIT ?",
            (*new.keys, PERMUTATIONS, MAX_CANDIDATES),
        ).fetchall()
        if not candidates:
            return None
        known = numpy.frombuffer(b"".join([low for _, low in candidates]), numpy.uint8)
        equal = known.reshape(-1, PERMUTATIONS) == numpy.frombuffer(new.low, numpy.uint8)
        shares = equal.sum(axis=1) / PERMUTATIONS
        best = int(shares.argmax())
        # Of bytes that have nothing to do with each other one in 256 is equal.
        similarity = max(0.0, (float(shares[best]) - 1 / 256) / (1 - 1 / 256))
        return Match(candidates[best][0], similarity) if similarity >= self._similarity else None

    def _add_logged(self, db: sqlite3.Connection, rows: list[dict[str, Any]]) -> bool:
        self._begin(db)
        for row in rows:
            if "near_duplicate" in (row.get("checks") or ()):
                continue
            confirmed = db.execute("UPDATE originals SET logged = 1 WHERE id = ?", (row["id"],)).rowcount
            if not confirmed:
                _insert(db, self._of(row["id"], row["context"]), logged=True)
        next_seq = rows[-1]["seq"] + 1 if rows else self.next_seq
        _put_fact(db, "next_seq", next_seq)
        self._commit(db)
        self.next_seq = next_seq
        return True

    def _drop_ghosts(self, db: sqlite3.Connection) -> bool:
        """Take out what was added for drafts that a kill kept from the log."""
        self._begin(db)
        logged_n = _fact(db, "logged_n") or 0
        db.execute("DELETE FROM originals WHERE n > ? AND NOT logged", (logged_n,))
        last = db.execute("SELECT max(n) FROM originals").fetchone()[0] or 0
        _put_fact(db, "logged_n", last)
        self._commit(db)
        return True

    def _do(self, act: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """What `act` gives, or `otherwise` when the file is at fault; a damaged one is made anew, once."""
        with self._lock:
            if self._is_off:
                return otherwise
            try:
                return act(self._open())
            except (*SQLITE_ERRORS, OSError) as error:
                if is_of_the_disk(error) or self._was_damaged:
                    self._switch_off(error)
                else:
                    self._make_anew(error)
            return otherwise

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            db.executescript(_TABLES)
        return self._db

    def _load(self, db: sqlite3.Connection) -> None:
        version = f"{VERSION}/{self._rows}"
        if _fact(db, "version") not in (None, version):  # another version's: its signatures mean nothing here
            self._close()
            self._remove()
            db = self._open()
        _put_fact(db, "version", version)
        self.next_seq = int(_fact(db, "next_seq") or 0)

    def _begin(self, db: sqlite3.Connection) -> None:
        if not db.in_transaction:
            db.execute("BEGIN IMMEDIATE")

    def _commit_sometimes(self, db: sqlite3.Connection) -> None:
        """What a kill takes with it is read from the log again."""
        self._uncommitted += 1
        if self._uncommitted >= _COMMIT_ROWS or time.monotonic() - self._committed_at > _COMMIT_S:
            self._commit(db)

    def _commit(self, db: sqlite3.Connection) -> None:
        if db.in_transaction:
            db.execute("COMMIT")
        self._uncommitted = 0
        self._committed_at = time.monotonic()

    def _switch_off(self, error: Exception) -> None:
        self._is_off = True
        self._close()
        log.warning("duplicates.off", path=str(self.path), why=str(error), then="no context is compared")

    def _make_anew(self, error: Exception) -> None:
        self._was_damaged = True
        log.warning("duplicates.rebuilt", path=str(self.path), why=str(error))
        try:
            self._close()
            self._remove()
            self._load(self._open())
        except (*SQLITE_ERRORS, OSError) as failure:
            self._switch_off(failure)

    def _close(self) -> None:
        if self._db is not None:
            db, self._db = self._db, None
            db.close()

    def _remove(self) -> None:
        for part in self.path.parent.glob(self.path.name + "*"):
            part.unlink()


def _rows_of_a_band(similarity: float) -> int:
    """As many as can be, so that few unlike texts share a band and enough of the similar ones do."""
    return max(
        (
            rows
            for rows in range(1, _MAX_ROWS + 1)
            if 1 - (1 - similarity**rows) ** (PERMUTATIONS // rows) >= _RECALL
        ),
        default=1,
    )


def _insert(db: sqlite3.Connection, new: _Text, *, logged: bool) -> None:
    query = "INSERT INTO originals (id, low, logged) VALUES (?, ?, ?)"
    number = db.execute(query, (new.id, new.low, logged)).lastrowid
    db.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", [(key, number) for key in new.keys])


def _fact(db: sqlite3.Connection, name: str) -> Any:
    found = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return found[0] if found else None


def _put_fact(db: sqlite3.Connection, name: str, value: str | int) -> None:
    db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))
