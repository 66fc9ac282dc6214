"""The index of an inbox: which seeds are in its file, and what earlier requests were answered.

Everything here is derived from the file. The last keys are in memory alone, and are written together, in the
order of the keys: one by one, each would change a page of its own. So after a kill the SQLite file covers the
inbox up to an offset, behind which its lines are read again; it never has one too many.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from streamsyn.io.derived import DerivedDatabase

_KEYS_A_QUERY: Final = 500
_BUSY_TIMEOUT_S: Final = 60.0
_IN_MEMORY: Final = 32_768
"""About 4 MB."""
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


class InboxIndex:
    """The keys and answers of an inbox. For one thread at a time.

    Calls may raise `SQLITE_ERRORS` and OSError. Changes are provisional until `keep`: `forget`, and then
    reading what is behind `covered` again, undoes them.

    Args:
        path: The SQLite file.
        in_memory: Number of keys that are held in memory before they are written.
    """

    def __init__(self, path: Path, in_memory: int = _IN_MEMORY) -> None:
        self.path = path
        self._file = DerivedDatabase(path, _TABLES, busy_timeout_s=_BUSY_TIMEOUT_S)
        self._in_memory = in_memory
        self._keys: set[bytes] = set()
        self._answers: dict[str, tuple[bytes, bytes]] = {}

    def covered(self) -> Covered:
        """What the file covers."""
        found = dict(self._file.connect().execute("SELECT name, value FROM covered"))
        end, lines, accepted, taken, closed = (int(found.get(field.name, 0)) for field in fields(Covered))
        return Covered(end, lines, accepted, taken, bool(closed))

    def add(self, keys: Sequence[bytes]) -> set[bytes]:
        """Add the keys of seeds, and return those that are new."""
        new = set(keys) - self._keys
        unknown, db = list(new), self._file.connect()
        for start in range(0, len(unknown), _KEYS_A_QUERY):
            some = unknown[start : start + _KEYS_A_QUERY]
            query = f"SELECT key FROM seeds WHERE key IN ({','.join('?' * len(some))})"  # noqa: S608
            new.difference_update(key for (key,) in db.execute(query, some))
        self._keys |= new
        return new

    def add_answer(self, key: str, body: bytes, answer: bytes) -> None:
        """Add what the request with an idempotency key was answered; `body` is the hash of its content."""
        self._answers.setdefault(key, (body, answer))

    def answer(self, key: str) -> tuple[bytes, bytes] | None:
        """The hash of the content, and the answer, of the request with an idempotency key."""
        if key in self._answers:
            return self._answers[key]
        query = "SELECT body, answer FROM answers WHERE key = ?"
        row: tuple[bytes, bytes] | None = self._file.connect().execute(query, (key,)).fetchone()
        return row

    def keep(self, covered: Covered) -> None:
        """What was added is on disk in the inbox, up to `covered`."""
        if len(self._keys) + len(self._answers) >= self._in_memory:
            self.write(covered)

    def write(self, covered: Covered) -> None:
        """Write what is in memory alone: the file then covers the inbox up to `covered`."""
        db = self._file.connect()
        with db:  # rolls back when it cannot be written
            db.execute("BEGIN")
            db.executemany("INSERT OR IGNORE INTO seeds VALUES (?)", ((key,) for key in sorted(self._keys)))
            answers = ((key, *answer) for key, answer in self._answers.items())
            db.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", answers)
            rows = [(field.name, int(getattr(covered, field.name))) for field in fields(Covered)]
            db.executemany("INSERT OR REPLACE INTO covered VALUES (?, ?)", rows)
        self._keys.clear()
        self._answers.clear()

    def forget(self) -> None:
        """Drop what is in memory alone, and close the file; the next call opens it again."""
        self._keys.clear()
        self._answers.clear()
        self._file.close()

    def delete(self) -> None:
        """Delete the file and drop what is in memory."""
        self.forget()
        self._file.delete()

    def discard(self, error: Exception) -> None:
        """Delete everything if `error` means that the file is damaged.

        Raises:
            Exception: `error` itself, if the disk or the permissions are at fault.
        """
        self.forget()
        self._file.discard(error)
