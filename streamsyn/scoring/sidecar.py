"""OUT/scores/scores.sqlite: what `streamsyn score` found about the contexts of a log, beside the log.

It is derived: if it is deleted, the contexts are measured again. A finding belongs to a row by its `seq` and
a digest of its text, so a row that was written anew after a loss of power is measured anew. Readers of
contexts pass their rows through `with_scores`, and get them as if the run had measured them itself.
"""

import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, Final, Literal, TypeAlias, get_args

import orjson

from streamsyn.config.fingerprint import differences
from streamsyn.errors import ConfigError, SinkError
from streamsyn.io.derived import SQLITE_ERRORS, DerivedDatabase
from streamsyn.records import digest

Row: TypeAlias = dict[str, Any]
Measure = Literal["gain", "answers", "duplicates", "leaks"]
MEASURES: Final[tuple[Measure, ...]] = get_args(Measure)
FOLDER: Final = "scores"
"""In the run directory."""

_SCORES: Final = "scores.sqlite"
_BATCH: Final = 256
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS found (seq INTEGER, measure TEXT, text BLOB, body BLOB,
    PRIMARY KEY (seq, measure)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS settings (measure TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
"""
_SELECT: Final = "SELECT seq, measure, text, body FROM found WHERE seq BETWEEN ? AND ? ORDER BY seq"


@dataclass(frozen=True, slots=True)
class Found:
    """What a measure found about one context.

    Attributes:
        row: Its row in the log.
        measure: The measure.
        checks: Fields for its checks.
        flags: Its flags.
    """

    row: Row
    measure: Measure
    checks: Mapping[str, Any]
    flags: Sequence[str] = ()


class Sidecar:
    """The findings of a run, opened to add to them. Any number of threads may use it; all methods block.

    Args:
        root: The run directory.

    Raises (all methods):
        SinkError: The file cannot be used.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / FOLDER / _SCORES
        self._lock = Lock()
        self._file = DerivedDatabase(self._path, _TABLES)
        with self._in_use():
            self._db = self._file.connect()

    def settle(self, measure: Measure, settings: Mapping[str, Any], *, again: bool) -> None:
        """Record what a measure depends on; all its findings have the same.

        Args:
            measure: The measure.
            settings: By name; JSON values.
            again: Forget what was found with other settings, instead of refusing.

        Raises:
            ConfigError: Earlier findings were made with other settings.
        """
        now: dict[str, Any] = orjson.loads(orjson.dumps(settings))
        with self._in_use():
            saved = self._db.execute("SELECT value FROM settings WHERE measure = ?", (measure,)).fetchone()
            if saved is not None and not again and (changed := differences(orjson.loads(saved[0]), now, {})):
                raise ConfigError(
                    f"{self._path} holds findings of {measure} with other settings ({changed}); "
                    "restore them, or pass --again to measure anew"
                )
            if again:
                self._db.execute("DELETE FROM found WHERE measure = ?", (measure,))
            self._db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (measure, orjson.dumps(now)))

    def missing(self, rows: Sequence[Row], wanted: Collection[Measure]) -> list[tuple[Row, list[Measure]]]:
        """Those of consecutive rows of contexts that lack a measure, each with the measures it lacks."""
        with self._in_use():
            found = _found(self._db, rows)
        missing = []
        for row in rows:
            done = {measure for measure, _ in found.get(row["seq"], ())}
            if left := [measure for measure in wanted if measure not in done]:
                missing.append((row, left))
        return missing

    def add(self, findings: Iterable[Found]) -> None:
        """Keep findings; they survive a kill of this process."""
        new = [
            (
                one.row["seq"],
                one.measure,
                _digest(one.row),
                orjson.dumps({"checks": one.checks, "flags": list(one.flags)}),
            )
            for one in findings
        ]
        with self._in_use(), self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO found VALUES (?, ?, ?, ?)", new)

    def close(self) -> None:
        """Close the file."""
        with self._in_use():
            self._file.close()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._lock, _translated(self._path):
            yield

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield


def with_scores(root: Path, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of contexts, in the order of the log, with what `streamsyn score` found in their checks.

    Raises:
        SinkError: The findings cannot be read.
    """
    path = root / FOLDER / _SCORES
    if not path.exists():
        yield from rows
        return
    stream = iter(rows)
    with _translated(path), closing(_reading(path)) as db:
        while batch := list(islice(stream, _BATCH)):
            found = _found(db, batch)
            for row in batch:
                yield _merged(row, [body for _, body in found.get(row.get("seq"), ())])


def measured(root: Path) -> Counter[str]:
    """How many contexts `streamsyn score` has measured, by measure; nothing where it never ran.

    Raises:
        SinkError: The findings cannot be read.
    """
    path = root / FOLDER / _SCORES
    if not path.exists():
        return Counter()
    with _translated(path), closing(_reading(path)) as db:
        return Counter(dict(db.execute("SELECT measure, count(*) FROM found GROUP BY measure")))


def _reading(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)


def _found(db: sqlite3.Connection, rows: Sequence[Row]) -> dict[Any, list[tuple[str, bytes]]]:
    """The measures and what they found of consecutive rows, by seq."""
    found: dict[Any, list[tuple[str, bytes]]] = {}
    if not rows:
        return found
    by_seq = {row.get("seq"): row for row in rows}
    for seq, measure, text, body in db.execute(_SELECT, (rows[0].get("seq"), rows[-1].get("seq"))):
        row = by_seq.get(seq)
        if row is not None and _digest(row) == text:
            found.setdefault(seq, []).append((measure, body))
    return found


def _merged(row: Row, bodies: Sequence[bytes]) -> Row:
    if not bodies:
        return row
    checks = dict(row.get("checks") or {})
    flags = [flag for flag in checks.get("flags") or () if flag != "unscored"]
    for body in map(orjson.loads, bodies):
        cost = _sum(checks.get("scoring"), body["checks"].get("scoring"))
        checks |= body["checks"] | ({"scoring": cost} if cost else {})
        flags += [flag for flag in body["flags"] if flag not in flags]
    return row | {"checks": checks | {"flags": flags}}


def _sum(one: Any, other: Any) -> dict[str, Any]:
    """The tokens of two costs together."""
    parts = [cost for cost in (one, other) if isinstance(cost, dict)]
    names = {name for cost in parts for name in cost if name.endswith("_tokens")}
    return {name: sum(cost.get(name, 0) for cost in parts) for name in sorted(names)}


def _digest(row: Row) -> bytes:
    return digest(str(row.get("id")), str(row.get("context")))


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn an error of SQLite or of the disk into a SinkError that says what to do."""
    try:
        yield
    except (*SQLITE_ERRORS, OSError) as error:
        raise SinkError(
            f"cannot use {path}: {error}; make room, or delete {path.parent} and run `streamsyn score` again"
        ) from error
