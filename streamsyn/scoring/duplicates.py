"""Near-duplicates among all contexts of a run, found by MinHash signatures in a SQLite file.

Each context that is not a near-duplicate of an earlier one is kept as an original: 128 bytes of its
signature, and its bands (groups of rows of the signature; similar texts are likely to share one). A context
is compared with the originals that share a band with it. A near-duplicate does not become an original:
otherwise, in a chain of texts of which each resembles the one before, a text could be a duplicate although it
resembles none of those that remain when duplicates are left out.

The file is a function of the log: it holds the originals among the first `next_seq` contexts, by their seq.
Those whose outcome is not on disk yet are held in memory. So a rejected draft or a kill leaves nothing
behind, and a run that resumes reads the contexts from `next_seq` on. A missing or damaged file is made anew;
when the disk fails, comparison is switched off. Nothing here raises.
"""

import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, Final, TypeVar

import numpy
import structlog

from streamsyn.io.derived import SQLITE_ERRORS, DerivedDatabase, is_disk_error
from streamsyn.shingles import PERMUTATIONS, VERSION, Signature, band_keys, signature

log = structlog.get_logger()

T = TypeVar("T")

CACHE_KIB: Final = 32 * 1024
MAX_CANDIDATES: Final = 4096
"""The most originals that a context is compared with: the earliest of those that share a band."""
_RECALL: Final = 0.99
_MAX_ROWS: Final = 16
_BATCH_ROWS: Final = 500
_COMMIT_ROWS: Final = 5000
_COMMIT_S: Final = 10.0
"""Bands are spread over the whole file: the more are written at once, the fewer pages are written twice."""
_SCHEMA: Final = 2
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS originals (n INTEGER PRIMARY KEY, id TEXT NOT NULL, low BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS bands (key INTEGER, n INTEGER, PRIMARY KEY (key, n)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Match:
    """The most similar original, and the estimated Jaccard similarity, 0..1."""

    id: str
    similarity: float


@dataclass(frozen=True, slots=True)
class _Text:
    """The id, the bands and the low bytes of the signature of one text."""

    id: str
    keys: tuple[int, ...]
    low: bytes


class _Pending:
    """Originals whose outcome is not on disk yet. No call blocks."""

    def __init__(self) -> None:
        self._texts: dict[str, _Text] = {}
        self._by_key: dict[int, dict[str, _Text]] = {}
        self._lock = Lock()

    def add(self, text: _Text) -> None:
        """Add an original, in place of one with the same id."""
        self.pop(text.id)
        with self._lock:
            self._texts[text.id] = text
            for key in text.keys:
                self._by_key.setdefault(key, {})[text.id] = text

    def pop(self, draft_id: str) -> _Text | None:
        """Remove and return an original, if there is one of that id."""
        with self._lock:
            text = self._texts.pop(draft_id, None)
            for key in text.keys if text is not None else ():
                same = self._by_key[key]
                del same[draft_id]
                if not same:
                    del self._by_key[key]
            return text

    def sharing_a_band(self, text: _Text) -> list[tuple[str, bytes]]:
        """The id and the low bytes of each original that shares a band with `text`."""
        with self._lock:
            found = {one.id: one.low for key in text.keys for one in self._by_key.get(key, {}).values()}
            return list(found.items())


class Duplicates:
    """The originals of a run. Any number of threads may use it; all methods block, unless they say otherwise.

    Args:
        path: The SQLite file, which need not exist.
        similarity: The least Jaccard similarity of near-duplicates, 0..1. 99 % of the pairs at this
            similarity are found, and nearly all above it.
    """

    def __init__(self, path: Path, similarity: float) -> None:
        self.path = path
        self._similarity = similarity
        self._rows = _rows_of_a_band(similarity)
        self._lock = Lock()
        self._file = DerivedDatabase(path, _TABLES, pragmas=[f"cache_size = -{CACHE_KIB}"])
        self._is_off = False
        self._was_damaged = False
        self._uncommitted = 0
        self._committed_at = time.monotonic()
        self._pending = _Pending()
        self._logged: deque[tuple[int, str]] = deque()
        """Seqs and ids of contexts on disk that are not in the file yet."""
        self.next_seq = 0
        """The first row of the log that the file does not cover, and that `catch_up` needs."""
        self._do(self._load, None)

    def find(self, draft_id: str, text: str) -> Match | None:
        """The most similar original other than that of `draft_id`; None if none is similar enough."""
        new = self._text(draft_id, text)
        return self._do(lambda db: self._most_similar(db, new), None)

    def check_and_add(self, draft_id: str, text: str, signed: Signature | None = None) -> Match | None:
        """As `find`; a text without a match is an original from now on.

        Call it when nothing else can reject the draft. Of two similar texts that are checked at the same
        time, exactly one has a match. `signed` is the signature of the text, where it is known.
        """
        new = self._text(draft_id, text, signed)

        def check_and_add(db: sqlite3.Connection) -> Match | None:
            self._add_logged(db)
            match = self._most_similar(db, new)
            if match is None:
                self._pending.add(new)
            return match

        return self._do(check_and_add, None)

    def forget(self, draft_id: str) -> None:
        """Remove an original whose draft did not become a context after all. Does not block."""
        self._pending.pop(draft_id)

    def logged(self, seq: int, draft_id: str) -> None:
        """Record that a context is on disk: the next one in the order of the log. Does not block."""
        self._logged.append((seq, draft_id))

    def catch_up(self, rows: Iterable[dict[str, Any]]) -> bool:
        """Bring the originals in line with the log, before a run begins.

        Args:
            rows: All contexts of the log in order, from `next_seq` or earlier on.

        Returns:
            False if the file turned out to be damaged. It is empty now: call again with all rows.
        """
        was_empty = self.next_seq == 0 and not self._was_damaged
        seen = iter(rows)
        while batch := list(islice(seen, _BATCH_ROWS)):
            fresh = [row for row in batch if row["seq"] >= self.next_seq]
            if not self._do(partial(self._add_rows, rows=fresh), False):
                return self._is_off
        if was_empty and self.next_seq:
            log.warning(
                "duplicates.rebuilt",
                path=str(self.path),
                why="missing, or made by another version",
                rows=self.next_seq,
            )
        return True

    def close(self) -> None:
        """Add what is on disk, commit, and close the file."""
        self._do(self._add_logged, None)
        self._do(self._commit, None)
        with self._lock:
            self._file.close()
            self._is_off = True

    def _text(self, draft_id: str, text: str, signed: Signature | None = None) -> _Text:
        values = (signed or signature(text)).values
        return _Text(draft_id, band_keys(values, self._rows), values[::4])

    def _most_similar(self, db: sqlite3.Connection, new: _Text) -> Match | None:
        places = ",".join("?" * len(new.keys))
        candidates = db.execute(
            "SELECT id, low FROM originals WHERE n IN "  # noqa: S608
            f"(SELECT n FROM bands WHERE key IN ({places})) AND length(low) = ? ORDER BY n LIMIT ?",
            (*new.keys, PERMUTATIONS, MAX_CANDIDATES),
        ).fetchall()
        candidates += self._pending.sharing_a_band(new)
        candidates = [one for one in candidates if one[0] != new.id]  # written again, after a kill
        if not candidates:
            return None
        known = numpy.frombuffer(b"".join([low for _, low in candidates]), numpy.uint8)
        equal = known.reshape(-1, PERMUTATIONS) == numpy.frombuffer(new.low, numpy.uint8)
        shares = equal.sum(axis=1) / PERMUTATIONS
        best = int(shares.argmax())
        # One in 256 bytes of unrelated texts is equal by chance.
        similarity = max(0.0, (float(shares[best]) - 1 / 256) / (1 - 1 / 256))
        return Match(candidates[best][0], similarity) if similarity >= self._similarity else None

    def _add_rows(self, db: sqlite3.Connection, rows: list[dict[str, Any]]) -> bool:
        self._begin(db)
        for row in rows:
            if "near_duplicate" in (row.get("checks") or ()):
                continue
            text = self._text(row["id"], row["context"])
            # A later draft of a seed with a document repeats the first, unmarked.
            if not row.get("draft") or self._most_similar(db, text) is None:
                _insert(db, row["seq"], text)
        self._cover(db, rows[-1]["seq"] + 1 if rows else self.next_seq)
        self._commit(db)
        return True

    def _add_logged(self, db: sqlite3.Connection) -> None:
        """Move originals whose outcome is on disk from memory to the file."""
        while self._logged:
            seq, draft_id = self._logged.popleft()
            self._begin(db)
            text = self._pending.pop(draft_id)
            if text is not None:
                _insert(db, seq, text)
            if seq == self.next_seq:  # not after the file was made anew: then a later run reads the log
                self._cover(db, seq + 1)
            self._uncommitted += 1
        self._commit_sometimes(db)

    def _cover(self, db: sqlite3.Connection, next_seq: int) -> None:
        """Record that the file holds the originals among all contexts below `next_seq`."""
        _put_fact(db, "next_seq", next_seq)
        self.next_seq = next_seq

    def _do(self, act: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """What `act` returns, or `otherwise` if the file fails; a damaged one is made anew, once."""
        with self._lock:
            if self._is_off:
                return otherwise
            try:
                return act(self._file.connect())
            except (*SQLITE_ERRORS, OSError) as error:
                if is_disk_error(error) or self._was_damaged:
                    self._switch_off(error)
                else:
                    self._make_anew(error)
            return otherwise

    def _load(self, db: sqlite3.Connection) -> None:
        version = f"{_SCHEMA}/{VERSION}/{self._rows}"
        if _fact(db, "version") not in (None, version):  # its signatures cannot be compared with ours
            self._file.delete()
            db = self._file.connect()
        _put_fact(db, "version", version)
        self.next_seq = int(_fact(db, "next_seq") or 0)

    def _begin(self, db: sqlite3.Connection) -> None:
        if not db.in_transaction:
            db.execute("BEGIN IMMEDIATE")

    def _commit_sometimes(self, db: sqlite3.Connection) -> None:
        """Commit now and then: what a kill takes is read from the log again."""
        if self._uncommitted >= _COMMIT_ROWS or time.monotonic() - self._committed_at > _COMMIT_S:
            self._commit(db)

    def _commit(self, db: sqlite3.Connection) -> None:
        if db.in_transaction:
            db.execute("COMMIT")
        self._uncommitted = 0
        self._committed_at = time.monotonic()

    def _switch_off(self, error: Exception) -> None:
        self._is_off = True
        self._file.close()
        log.warning("duplicates.off", path=str(self.path), why=str(error), then="no context is compared")

    def _make_anew(self, error: Exception) -> None:
        self._was_damaged = True
        log.warning("duplicates.rebuilt", path=str(self.path), why=str(error))
        try:
            self._file.discard(error)
            self._load(self._file.connect())
        except (*SQLITE_ERRORS, OSError) as failure:
            self._switch_off(failure)


def _rows_of_a_band(similarity: float) -> int:
    """The most rows a band can have while pairs at `similarity` share a band with a chance of `_RECALL`.

    The more rows, the fewer dissimilar texts share a band.
    """
    return max(
        (
            rows
            for rows in range(1, _MAX_ROWS + 1)
            if 1 - (1 - similarity**rows) ** (PERMUTATIONS // rows) >= _RECALL
        ),
        default=1,
    )


def _insert(db: sqlite3.Connection, seq: int, new: _Text) -> None:
    db.execute("INSERT OR REPLACE INTO originals VALUES (?, ?, ?)", (seq, new.id, new.low))
    db.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", [(key, seq) for key in new.keys])


def _fact(db: sqlite3.Connection, name: str) -> Any:
    found = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return found[0] if found else None


def _put_fact(db: sqlite3.Connection, name: str, value: str | int) -> None:
    db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))
