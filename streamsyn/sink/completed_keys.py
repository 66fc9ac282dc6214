"""Which drafts are finished, and which were read in this run: two sets of keys in SQLite files.

Both grow with the number of seeds, so neither is held in memory beyond SQLite's page cache (2 MB). The set of
finished drafts is derived from the log: missing keys are read from the shards again, and a damaged file is
made anew. The set of those read is scratch.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from threading import RLock
from typing import Any, Final

import structlog

from streamsyn.errors import SinkError
from streamsyn.io.derived import SQLITE_ERRORS, DerivedDatabase, is_disk_error, open_scratch
from streamsyn.records import draft_key
from streamsyn.sink import shards
from streamsyn.sink.manifest import Manifest, SealedShard

log = structlog.get_logger()

KEY_BYTES: Final = 16
_KEYS_A_QUERY: Final = 500
_BUSY_TIMEOUT_S: Final = 60.0
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS finished (key BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shards (path TEXT PRIMARY KEY) WITHOUT ROWID;
"""
_SCRATCH_TABLES: Final = "CREATE TABLE claimed (key BLOB PRIMARY KEY, spooled INTEGER) WITHOUT ROWID;"


def row_key(row: dict[str, Any]) -> bytes:
    """The key of the draft or bad line whose outcome a row of contexts or rejects is."""
    if key := row.get("key"):
        return bytes.fromhex(key)
    return draft_key(row["seed_id"], row["draft"])


class Claim(Enum):
    """The state of a draft that has just been read."""

    NEW = "new"
    FINISHED = "finished"
    REPEATED = "repeated"


class CompletedKeys:
    """The keys of all drafts that have an outcome in a sealed shard. For one thread at a time.

    Raises:
        SinkError: The file cannot be used, for a reason that making it anew does not cure.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Its write-ahead log lets the producer look keys up while the sink adds those of a shard.
        self._file = DerivedDatabase(path, _TABLES, busy_timeout_s=_BUSY_TIMEOUT_S)
        with _translated(path):
            try:
                self._db = self._file.connect()
            except SQLITE_ERRORS as error:
                self._make_anew(error)

    def add_shard(self, shard: SealedShard, keys: bytes) -> None:
        """Add the keys of the rows of a sealed shard, concatenated, KEY_BYTES each."""
        split = (keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES))
        with _translated(self.path):
            self._write(split, shard)

    def catch_up(self, manifest: Manifest, root: Path, tail: Sequence[bytes]) -> None:
        """Add the shards that are sealed but not in here: after a kill, or when the file was made anew.

        Args:
            manifest: Lists the sealed shards.
            root: The run directory.
            tail: The keys of the rows in open shards.

        Raises:
            SinkError: A shard is missing or damaged.
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
        with _translated(self.path):
            self._file.close()

    def _catch_up(self, shards: dict[str, SealedShard], root: Path, tail: Sequence[bytes]) -> None:
        known = {path for (path,) in self._db.execute("SELECT path FROM shards")}
        # A shard that the manifest no longer lists is being written again.
        unlisted = ((path,) for path in known - shards.keys())
        self._db.executemany("DELETE FROM shards WHERE path = ?", unlisted)
        for path in shards.keys() - known:
            self._write(_keys_of(root, shards[path]), shards[path])
        self._write(tail, None)

    def _make_anew(self, error: Exception) -> None:
        """Start with an empty file, unless the disk is at fault."""
        self._file.discard(error)
        log.warning("index.rebuilt", path=str(self.path), why=str(error))
        self._db = self._file.connect()

    def _write(self, keys: Iterable[bytes], shard: SealedShard | None) -> None:
        with self._db:  # rolls back when the keys cannot be read
            self._db.execute("BEGIN")
            self._db.executemany("INSERT OR IGNORE INTO finished VALUES (?)", ((key,) for key in keys))
            if shard is not None:
                self._db.execute("INSERT OR IGNORE INTO shards VALUES (?)", (shard.path,))


class Claims:
    """Which keys are finished, and which were read before in this run. For the thread that reads seeds.

    Another thread may close it: closing waits for a call in progress, and later calls raise a SinkError.

    Args:
        finished: The file of CompletedKeys; None when there is no run directory (`preview`).
        scratch: The file for the keys that were read in this run; deleted before and after.

    Raises:
        SinkError: The disk is full, or the file of CompletedKeys is damaged.
    """

    def __init__(self, finished: Path | None, scratch: Path) -> None:
        self._scratch = scratch
        self._path = finished or scratch
        self._lock = RLock()  # SQLite crashes when a connection is closed while it is in use
        with _translated(self._path):
            self._db = open_scratch(scratch, _SCRATCH_TABLES, busy_timeout_s=_BUSY_TIMEOUT_S)
            self._has_finished = finished is not None
            if finished is not None:
                self._db.execute("ATTACH ? AS old", (str(finished),))
                self._has_finished = bool(self._db.execute("SELECT 1 FROM old.finished LIMIT 1").fetchall())

    def claim(self, key: bytes, *, spooled: bool = False) -> Claim:
        """Mark `key` as read in this run; whether it was read before, is finished, or is new.

        Args:
            key: The key of a bad line, or of the first draft of a seed.
            spooled: Whether the spool holds what was read, so that a later run reads it without its source.
        """
        with self._in_use():
            row = (key, spooled)
            new = self._db.execute("INSERT OR IGNORE INTO main.claimed VALUES (?, ?)", row).rowcount
        if not new:
            return Claim.REPEATED
        return Claim.FINISHED if self.finished([key]) else Claim.NEW

    def finished(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of `keys` that have an outcome of an earlier run."""
        found: set[bytes] = set()
        if not self._has_finished:
            return found
        with self._in_use():
            for start in range(0, len(keys), _KEYS_A_QUERY):
                some = keys[start : start + _KEYS_A_QUERY]
                query = f"SELECT key FROM old.finished WHERE key IN ({','.join('?' * len(some))})"  # noqa: S608
                found.update(key for (key,) in self._db.execute(query, some))
        return found

    def is_known(self, keys: Sequence[bytes]) -> bool:
        """Whether later runs need not read an entry again: it is spooled, or all its `keys` are finished."""
        query = "SELECT 1 FROM main.claimed WHERE key = ? AND spooled"
        with self._in_use():
            spooled = self._db.execute(query, (keys[0],)).fetchall()
        return bool(spooled) or len(self.finished(keys)) == len(set(keys))

    def is_claimed(self, key: bytes) -> bool:
        """Whether `key` was read before in this run."""
        with self._in_use():
            return bool(self._db.execute("SELECT 1 FROM main.claimed WHERE key = ?", (key,)).fetchall())

    @contextmanager
    def batch(self) -> Iterator[None]:
        """One transaction for the claims of a batch of seeds.

        Raises:
            SinkError: The disk is full, or the file of CompletedKeys is damaged.
        """
        with self._in_use():
            self._db.execute("BEGIN")
            yield
            self._db.execute("COMMIT")

    def close(self) -> None:
        """Close the files, and delete that of the keys read in this run."""
        with self._lock, suppress(*SQLITE_ERRORS, OSError):  # the next run deletes what is left
            self._db.close()
            self._scratch.unlink(missing_ok=True)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._lock, _translated(self._path):
            yield


def _keys_of(root: Path, shard: SealedShard) -> Iterator[bytes]:
    """The keys of all rows of a sealed shard: a draft whose key is missing would be done twice."""
    rows = 0
    try:
        for row in shards.rows(root / shard.path):
            yield row_key(row)
            rows += 1
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise SinkError(f"{root / shard.path} cannot be read: {error!r}; restore it from a copy") from error
    if rows != shard.rows:
        raise SinkError(
            f"{root / shard.path} has {rows} readable rows, the manifest says {shard.rows}; "
            "restore it from a copy"
        )


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn an error of SQLite or of the disk into a SinkError that says what to do."""
    try:
        yield
    except (*SQLITE_ERRORS, OSError) as error:
        advice = (
            "what is on disk stays valid: make room and run again to go on"
            if is_disk_error(error)
            else "`streamsyn verify --repair` makes it anew"
        )
        raise SinkError(f"cannot use {path}: {error}; {advice}") from error
