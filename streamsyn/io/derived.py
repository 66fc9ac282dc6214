"""Whether a disk is at fault, or what lies on it: derived files are made anew only where it is the latter."""

import sqlite3

SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""What a call of SQLite may raise: it quotes a damaged schema as it stands, and Python cannot decode that."""
_DISK = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
)


def is_of_the_disk(error: Exception) -> bool:
    """Whether the disk is at fault, or its rights, and not the SQLite file."""
    if isinstance(error, OSError):
        return True
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    return code & 0xFF in _DISK and code != sqlite3.SQLITE_IOERR_SHORT_READ
