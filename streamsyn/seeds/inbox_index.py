"""The index of an inbox: which seeds are in its file, and what earlier requests were answered.

Everything here is derived from the file, and covers it up to an offset: a transaction is committed after its
lines are on disk, so after a kill the index may lack the last lines, and never has one too many.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from streamsyn.io.derived import DerivedDatabase

_KEYS_A_QUERY: Final = 500
_BUSY_TIMEOUT_S: Final = 60.0
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS seeds (key BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, body BLOB, answer BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS covered (name TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID;
"""


@dataclass(slots=True)
class Covered:
    """What an index covers of the file.

    Attributes:
        end: The offset behind the last line, in bytes.
        lines: Number of lines.
        accepted: Number of entries among them.
        taken: Number of entries that a run has read.
        closed: Whether the inbox is closed.
    """

    end: int = 0
    lines: int = 0
    accepted: int = 0
    taken: int = 0
    closed: bool = False


class InboxIndex(DerivedDatabase):
    """The SQLite file. For one thread at a time; calls may raise `SQLITE_ERRORS` and OSError."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _TABLES, busy_timeout_s=_BUSY_TIMEOUT_S)

    def covered(self) -> Covered:
        """What is covered by the transactions that were committed."""
        found = dict(self.connect().execute("SELECT name, value FROM covered"))
        end, lines, accepted, taken, closed = (int(found.get(field.name, 0)) for field in fields(Covered))
        return Covered(end, lines, accepted, taken, bool(closed))

    def begin(self) -> None:
        """Begin a transaction."""
        self.connect().execute("BEGIN")

    def add(self, keys: Sequence[bytes]) -> set[bytes]:
        """Add the keys of seeds, and return those that are new."""
        new: set[bytes] = set()
        for start in range(0, len(keys), _KEYS_A_QUERY):
            some = keys[start : start + _KEYS_A_QUERY]
            places = ",".join(["(?)"] * len(some))
            query = f"INSERT OR IGNORE INTO seeds VALUES {places} RETURNING key"  # noqa: S608
            new.update(key for (key,) in self.connect().execute(query, some))
        return new

    def add_answer(self, key: str, body: bytes, answer: bytes) -> None:
        """Keep what the request with an idempotency key was answered; `body` is the hash of its content."""
        self.connect().execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (key, body, answer))

    def answer(self, key: str) -> tuple[bytes, bytes] | None:
        """The hash of the content, and the answer, of the request with an idempotency key."""
        query = "SELECT body, answer FROM answers WHERE key = ?"
        row: tuple[bytes, bytes] | None = self.connect().execute(query, (key,)).fetchone()
        return row

    def commit(self, covered: Covered) -> None:
        """End the transaction: the index covers the file up to `covered`."""
        rows = [(field.name, int(getattr(covered, field.name))) for field in fields(Covered)]
        self.connect().executemany("INSERT OR REPLACE INTO covered VALUES (?, ?)", rows)
        self.connect().execute("COMMIT")
