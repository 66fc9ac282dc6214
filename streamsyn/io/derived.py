"""SQLite files that can be made again from something else: opened, found damaged, and deleted.

What a lost file means, and how it is filled again, is for the caller to say. All calls may raise
`SQLITE_ERRORS`, and OSError.
"""

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from streamsyn.io.durable import make_folder

SQLITE_ERRORS: Final = (sqlite3.Error, UnicodeDecodeError)
"""What a call of SQLite may raise: its messages quote a damaged schema, which Python may fail to decode."""
_DISK_CODES: Final = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
)


class DerivedDatabase:
    """A SQLite file that is made when it is missing and deleted when it is damaged. For one thread at a time.

    What is committed survives a kill of this process (a write-ahead log, synced at checkpoints only); a loss
    of power may take the last transactions, and leaves the file whole.

    Args:
        path: The file; its folder is made when it is missing.
        schema: Statements that create what is missing (`CREATE TABLE IF NOT EXISTS ...`).
        pragmas: Settings beyond those of every such file, applied before the first table is made.
        busy_timeout_s: How long to wait for another connection that is writing.
    """

    def __init__(
        self, path: Path, schema: str, *, pragmas: Sequence[str] = (), busy_timeout_s: float = 5.0
    ) -> None:
        self.path = path
        self._schema = schema
        self._pragmas = (*pragmas, "journal_mode = WAL", "synchronous = NORMAL")
        self._busy_timeout_s = busy_timeout_s
        self._db: sqlite3.Connection | None = None

    def connect(self) -> sqlite3.Connection:
        """The connection, in autocommit mode; the file is opened by the first call."""
        if self._db is None:
            make_folder(self.path.parent)
            self._db = _connect(self.path, self._pragmas, self._schema, self._busy_timeout_s)
        return self._db

    def close(self) -> None:
        """Close the file; the next `connect` opens it again."""
        if self._db is not None:
            db, self._db = self._db, None
            db.close()

    def delete(self) -> None:
        """Close and delete the file and its write-ahead log; the next `connect` makes an empty one."""
        self.close()
        for part in self.path.parent.glob(self.path.name + "*"):
            part.unlink(missing_ok=True)

    def discard(self, error: Exception) -> None:
        """Delete the file if `error`, which using it raised, means that it is damaged.

        Raises:
            Exception: `error` itself, if the disk or the permissions are at fault: deleting would not help.
        """
        if is_disk_error(error):
            raise error
        self.delete()


def open_scratch(path: Path, schema: str, *, busy_timeout_s: float) -> sqlite3.Connection:
    """An empty SQLite file for the use of this process alone: nothing in it is meant to survive."""
    path.unlink(missing_ok=True)
    return _connect(path, ("journal_mode = OFF", "synchronous = OFF"), schema, busy_timeout_s)


def is_disk_error(error: Exception) -> bool:
    """Whether the disk or the permissions are at fault rather than the content of the SQLite file."""
    if isinstance(error, OSError):
        return True
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    return code & 0xFF in _DISK_CODES and code != sqlite3.SQLITE_IOERR_SHORT_READ


def _connect(path: Path, pragmas: Sequence[str], schema: str, busy_timeout_s: float) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=busy_timeout_s)
    try:
        for pragma in pragmas:
            db.execute(f"PRAGMA {pragma}")
        db.executescript(schema)
    except BaseException:
        db.close()
        raise
    return db
