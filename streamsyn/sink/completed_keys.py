"""Which drafts are finished, and which seeds have been read: sets that live on disk.

Both grow with the number of seeds, so neither is held in memory: SQLite keeps them, with a page cache
of 2 MB (its default). They are derived from the log. What is missing is read from the shards again; a damaged
file is made anew.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from threading import RLock
from typing import Any

import structlog

from streamsyn.errors import SinkError
from streamsyn.io.derived import SQLITE_ERRORS, is_of_the_disk
from streamsyn.records import draft_key
from streamsyn.sink import shards
from streamsyn.sink.manifest import Manifest, SealedShard

log = structlog.get_logger()


def row_key(row: dict[str, Any]) -> bytes:
    """The key of the draft (or bad line) that a row of contexts or rejects finishes."""
    if key := row.get("key"):
        return bytes.fromhex(key)
    return draft_key(row["seed_id"], row["draft"])


KEY_BYTES = 16
_KEYS_A_QUERY = 500


class Claim(Enum):
    """What is known of a draft that has just been read."""

    NEW = "new"
    FINISHED = "finished"
    REPEATED = "repeated"


class CompletedKeys:
    """Keys of all drafts that have an outcome in a sealed shard. For one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(":memory:")
        with _translated(path):
            try:
                self._open()
            except SQLITE_ERRORS as error:
                self._make_anew(error)

    def add_shard(self, shard: SealedShard, keys: bytes) -> None:
        """Add the keys of a shard that has been sealed: KEY_BYTES each, one after the other."""
        split = (keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES))
        with _translated(self.path):
            self._write(split, shard)

    def catch_up(self, manifest: Manifest, root: Path, tail: Sequence[bytes]) -> None:
        """Add the shards that are sealed but not yet in here: after a kill, or when made anew.

        Args:
            manifest: Says which shards are sealed.
            root: The run directory.
            tail: Keys of the rows in open shards.

        Raises:
            SinkError: One of them is missing or damaged.
        """
        shards = {shard.path: shard for shard in manifest.shards if shard.kind != "samples"}
        with _translated(self.path):
            try:
                self._catch_up(shards, root, tail)
            except SQLITE_ERRORS as error:
                self._make_anew(error)
                self._catch_up(shards, root, tail)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _catch_up(self, shards: dict[str, SealedShard], root: Path, tail: Sequence[bytes]) -> None:
        known = {path for (path,) in self._db.execute("SELECT path FROM shards")}
        # One that the manifest no longer lists is being written again.
        unlisted = ((path,) for path in known - shards.keys())
        self._db.executemany("DELETE FROM shards WHERE path = ?", unlisted)
        for path in shards.keys() - known:
            self._write(_keys_of(root, shards[path]), shards[path])
        self._write(tail, None)

    def _make_anew(self, error: Exception) -> None:
        """Start with an empty file, when what is wrong is the file."""
        if is_of_the_disk(error):
            raise error
        log.warning("index.rebuilt", path=str(self.path), why=str(error))
        self._db.close()
        for part in self.path.parent.glob(self.path.name + "*"):
            part.unlink()
        self._open()

    def _open(self) -> None:
        self._db.close()
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=60)
        self._db = db
        # A write-ahead log lets the producer look things up while the sink adds a shard.
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("CREATE TABLE IF NOT EXISTS finished (key BLOB PRIMARY KEY) WITHOUT ROWID")
        db.execute("CREATE TABLE IF NOT EXISTS shards (path TEXT PRIMARY KEY) WITHOUT ROWID")

    def _write(self, keys: Iterable[bytes], shard: SealedShard | None) -> None:
        with self._db:  # rolls back when the keys cannot be read
            self._db.execute("BEGIN")
            self._db.executemany("INSERT OR IGNORE INTO finished VALUES (?)", ((key,) for key in keys))
            if shard is not None:
                self._db.execute("INSERT OR IGNORE INTO shards VALUES (?)", (shard.path,))


class Claims:
    """Tells of keys whether they are finished, or read before in this run; for the thread that reads seeds.

    Another thread may close it: that waits for what is being done. Who was reading is told by a SinkError.

    Args:
        finished: The file of FinishedKeys; None when there is no run directory (`preview`).
        scratch: Where to keep what has been read in this run; removed before and after.

    Raises:
        SinkError: The disk is full, or the file of FinishedKeys is damaged.
    """

    def __init__(self, finished: Path | None, scratch: Path) -> None:
        self._scratch = scratch
        self._path = finished or scratch
        self._lock = RLock()  # SQLite does not survive that a connection is closed while it is used
        scratch.unlink(missing_ok=True)
        with _translated(self._path):
            self._db = sqlite3.connect(scratch, isolation_level=None, check_same_thread=False, timeout=60)
            self._db.execute("PRAGMA journal_mode = OFF")
            self._db.execute("PRAGMA synchronous = OFF")
            self._db.execute("CREATE TABLE claimed (key BLOB PRIMARY KEY) WITHOUT ROWID")
            self._has_finished = finished is not None
            if finished is not None:
                self._db.execute("ATTACH ? AS old", (str(finished),))
                self._has_finished = bool(self._db.execute("SELECT 1 FROM old.finished LIMIT 1").fetchall())

    def claim(self, key: bytes) -> Claim:
        """Take `key` for this run, unless it is finished or was taken before."""
        with self._in_use():
            new = self._db.execute("INSERT OR IGNORE INTO main.claimed VALUES (?)", (key,)).rowcount
        if not new:
            return Claim.REPEATED
        return Claim.FINISHED if self.finished([key]) else Claim.NEW

    def finished(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of `keys` for which an earlier run wrote an outcome."""
        found: set[bytes] = set()
        if not self._has_finished:
            return found
        with self._in_use():
            for start in range(0, len(keys), _KEYS_A_QUERY):
                some = keys[start : start + _KEYS_A_QUERY]
                query = f"SELECT key FROM old.finished WHERE key IN ({','.join('?' * len(some))})"  # noqa: S608
                found.update(key for (key,) in self._db.execute(query, some))
        return found

    def is_known(self, key: bytes) -> bool:
        """Whether `key` is finished or was taken in this run."""
        with self._in_use():
            claimed = self._db.execute("SELECT 1 FROM main.claimed WHERE key = ?", (key,)).fetchall()
        return bool(claimed) or bool(self.finished([key]))

    @contextmanager
    def batch(self) -> Iterator[None]:
        """A transaction round the claims of one batch of seeds.

        Raises:
            SinkError: The disk is full, or the file of FinishedKeys is damaged.
        """
        with self._in_use():
            self._db.execute("BEGIN")
            yield
            self._db.execute("COMMIT")

    def close(self) -> None:
        """Forget what was read in this run."""
        with self._lock:
            self._db.close()
            self._scratch.unlink(missing_ok=True)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._lock, _translated(self._path):
            yield


def _keys_of(root: Path, shard: SealedShard) -> Iterator[bytes]:
    """Keys of the rows of a sealed shard, all of them: a draft that is missed would be done twice."""
    rows = 0
    try:
        for row in shards.rows(root / shard.path):
            yield row_key(row)
            rows += 1
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise SinkError(f"{root / shard.path} cannot be read: {error!r}; restore it from a copy") from error
    if rows != shard.rows:
        raise SinkError(
            f"{root / shard.path} has {rows} rows that can be read, the manifest says {shard.rows}; "
            "restore it from a copy"
        )


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn an error of SQLite into a SinkError that says what to do."""
    try:
        yield
    except SQLITE_ERRORS as error:
        advice = (
            "what is on disk stays valid: make room and run again to go on"
            if is_of_the_disk(error)
            else "`streamsyn verify --repair` makes it anew"
        )
        raise SinkError(f"cannot use {path}: {error}; {advice}") from error
