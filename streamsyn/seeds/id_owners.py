"""Which pair each id belongs to, so that ids which begin anew in each file cost no pair.

The first pair that is read with an id keeps it. A different pair with the same id is named after its file and
a hash of the pair: `0` of b.jsonl becomes `0@b-1f3a9c2e`. The same pair under the same id stays a duplicate.

The owners are in a SQLite file in the run directory, so that a resumed run gives the same ids, also where
files come in a different order. If the file is lost, ids belong to the pairs that are then read first.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Final

import structlog

from streamsyn.errors import SinkError
from streamsyn.io.derived import SQLITE_ERRORS, DerivedDatabase, is_disk_error
from streamsyn.records import Entry, Seed, digest

log = structlog.get_logger()

_PAIR_BYTES: Final = 8
_HASH_CHARS: Final = 32
_KEYS_A_QUERY: Final = 500
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS owners (key BLOB PRIMARY KEY, pair BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS renamed (key BLOB PRIMARY KEY, id TEXT) WITHOUT ROWID;
"""


class IdOwners:
    """Gives each pair an id of its own. For one thread at a time.

    An id that is the hash of its pair belongs to it without a record. A chat whose system message does not
    count for its id may have the same one: then it is recorded, and hashes are looked up as well.

    Args:
        path: The SQLite file; made by the first seed with an id of its own.

    Attributes:
        renamed: Seeds that got a different id, this time.
    """

    def __init__(self, path: Path) -> None:
        self._file = DerivedDatabase(path, _TABLES)
        self._looks_up_hashes = path.exists()
        self.renamed = 0

    def own(self, entries: Sequence[Entry], is_taken: Callable[[str], bool] = lambda _: False) -> list[Entry]:
        """The entries, with different ids where an id belongs to a different pair.

        Args:
            entries: What was read next.
            is_taken: Whether this run has read a seed with this id before.

        Raises:
            SinkError: The file cannot be used, for a reason that making it anew does not cure.
        """
        if not self._looks_up_hashes and all(not isinstance(one, Seed) or _is_hash(one) for one in entries):
            return list(entries)
        try:
            try:
                return self._own(entries, is_taken)
            except SQLITE_ERRORS as error:
                self._file.discard(error)
                log.warning("index.rebuilt", path=str(self._file.path), why=str(error))
                return self._own(entries, is_taken)
        except (*SQLITE_ERRORS, OSError) as error:
            advice = (
                "make room and run again to resume" if is_disk_error(error) else "delete it and run again"
            )
            raise SinkError(f"cannot use {self._file.path}: {error}; {advice}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _own(self, entries: Sequence[Entry], is_taken: Callable[[str], bool]) -> list[Entry]:
        db = self._file.connect()
        keyed = [(entry, _key(entry.id) if isinstance(entry, Seed) else b"") for entry in entries]
        keys = [key for _, key in keyed if key]
        owners: dict[bytes, bytes] = {}
        for start in range(0, len(keys), _KEYS_A_QUERY):
            some = keys[start : start + _KEYS_A_QUERY]
            query = f"SELECT key, pair FROM owners WHERE key IN ({','.join('?' * len(some))})"  # noqa: S608
            owners.update(db.execute(query, some))
        new: dict[bytes, bytes] = {}
        hashes: set[str] = set()
        found: list[Entry] = []
        for entry, key in keyed:
            if isinstance(entry, Seed):
                is_hash, pair = _is_hash(entry), _pair(entry)
                owner = owners.get(key, new.get(key))
                if owner is None and is_hash:
                    hashes.add(entry.id)
                    owner = pair
                elif owner is None and not self._belongs_to_its_hash(entry, pair, hashes, is_taken):
                    owner = new[key] = pair
                    self._looks_up_hashes = self._looks_up_hashes or len(entry.id) == _HASH_CHARS
                found.append(entry if owner == pair else replace(entry, id=self._renamed(entry, pair)))
            else:
                found.append(entry)
        with db:
            db.execute("BEGIN")
            db.executemany("INSERT OR IGNORE INTO owners VALUES (?, ?)", new.items())
        return found

    def _belongs_to_its_hash(
        self, seed: Seed, pair: bytes, hashes: set[str], is_taken: Callable[[str], bool]
    ) -> bool:
        """Whether an id without a recorded owner is the hash of a different pair that was read before."""
        if len(seed.id) != _HASH_CHARS:
            return False
        query = "SELECT 1 FROM renamed WHERE key = ?"
        was_renamed = self._file.connect().execute(query, (_renamed_key(seed, pair),)).fetchall()
        return bool(was_renamed) or seed.id in hashes or is_taken(seed.id)

    def _renamed(self, seed: Seed, pair: bytes) -> str:
        """The id of a pair whose own id belongs to a different one; the same wherever the pair is."""
        db = self._file.connect()
        key = _renamed_key(seed, pair)
        new = f"{seed.id}@{_file(seed.origin)}-{pair[:4].hex()}"
        db.execute("INSERT OR IGNORE INTO renamed VALUES (?, ?)", (key, new))
        [(name,)] = db.execute("SELECT id FROM renamed WHERE key = ?", (key,)).fetchall()
        self.renamed += 1
        if self.renamed == 1:
            log.warning("seeds.id_taken", id=seed.id, at=seed.origin, now=name)
        return str(name)


def _renamed_key(seed: Seed, pair: bytes) -> bytes:
    return digest("renamed", seed.id, pair)


def _key(seed_id: str) -> bytes:
    return blake2b(seed_id.encode(), digest_size=16).digest()


def _pair(seed: Seed) -> bytes:
    text = f"{len(seed.instruction)} {len(seed.answer)} {seed.instruction}{seed.answer}{seed.context}"
    return blake2b(text.encode(), digest_size=_PAIR_BYTES).digest()


def _is_hash(seed: Seed) -> bool:
    if len(seed.id) != _HASH_CHARS:
        return False
    parts: Iterable[str] = (seed.context,) if seed.context else (seed.instruction, seed.answer)
    return seed.id == digest(*parts).hex()


def _file(origin: str) -> str:
    """The name of the file in an origin, without its endings."""
    source = origin.rpartition(":")[0]
    name = PurePosixPath(source).name
    return "stdin" if source == "-" else name.split(".")[0] or name
