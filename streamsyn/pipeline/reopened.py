"""What a retry may change, and where the seeds of the rejects come from that it asks again.

The row of a reject holds the instruction and the answer, so most seeds need no source. A document, and a line
that was not a seed, are in the source only: they are asked again when the source is read, as in any resume.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import structlog

from streamsyn.config.loading import Config
from streamsyn.errors import ConfigError
from streamsyn.io.derived import open_scratch
from streamsyn.io.inputs import find_rows
from streamsyn.records import BadSeed, Draft, Entry, Seed, Work
from streamsyn.sink.completed_keys import row_key
from streamsyn.sink.log import RunLog

log = structlog.get_logger()

_CHANGEABLE: Final = ("recipe.", "checks.", "scoring.", "fleet.models", "model")
_FIXED: Final = frozenset({"recipe.use", "recipe.contexts_per_seed"})
_BATCH: Final = 64
_TABLES: Final = """
CREATE TABLE drafts (key BLOB PRIMARY KEY, seq INTEGER) WITHOUT ROWID;
CREATE TABLE lines (name TEXT, origin TEXT, seq INTEGER);
CREATE INDEX line_names ON lines (name);
"""
_BUSY_TIMEOUT_S: Final = 60.0


def may_change(root: Path) -> Callable[[str], bool]:
    """Whether a retry may change a key of the fingerprint: what outcomes are written and judged by.

    The names of the seeds' fields too, as long as no context is there: other names make other seeds.
    """
    has_contexts = any((root / "contexts").glob("part-*"))

    def is_changeable(key: str) -> bool:
        if key.startswith("seeds.fields."):
            return not has_contexts
        return key.startswith(_CHANGEABLE) and key not in _FIXED

    return is_changeable


def without_missing_sources(config: Config) -> Config:
    """Return the configuration without the sources that are gone; each is logged."""
    present = []
    for source in config.seeds.sources:
        try:
            if source.path != "-":
                find_rows(source.path, "seeds")
            present.append(source)
        except ConfigError as error:
            log.warning("retry.source_missing", why=str(error), then="its unreadable lines stay rejected")
    return config.model_copy(update={"seeds": config.seeds.model_copy(update={"sources": tuple(present)})})


class Reopened:
    """The rejects that are asked again, for the thread that reads seeds.

    Args:
        run_log: The log.
        takes_documents: Whether seeds are documents, which rejects do not hold.
    """

    def __init__(self, run_log: RunLog, *, takes_documents: bool) -> None:
        self._log = run_log
        self._takes_documents = takes_documents

    def drafts(self) -> Iterator[list[Draft]]:
        """The drafts whose seeds the log holds, in batches."""
        rows = (row for row in self._log.open_rejects() if self._holds_seed(row))
        drafts = map(_draft, rows)
        while batch := list(islice(drafts, _BATCH)):
            yield batch

    @contextmanager
    def in_sources(self) -> Iterator["Sought | None"]:
        """The other rejects, to be found in the sources while the block runs; None if there are none."""
        rows = (row for row in self._log.open_rejects() if not self._holds_seed(row))
        first = next(rows, None)
        if first is None:
            yield None
            return
        with closing(Sought(self._log.epoch.database("retry.sqlite"))) as sought:
            sought.add(first)
            for row in rows:
                sought.add(row)
            yield sought

    def _holds_seed(self, row: dict[str, Any]) -> bool:
        return not self._takes_documents and isinstance(row.get("seed_id"), str)


class Sought:
    """Rejects that are asked again once their seed is read from a source, in a scratch file.

    Args:
        path: The scratch file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = open_scratch(path, _TABLES, busy_timeout_s=_BUSY_TIMEOUT_S)
        self._has_lines = False

    def add(self, row: dict[str, Any]) -> None:
        """Seek the seed of a reject."""
        if row.get("seed_id") is not None:
            self._db.execute("INSERT OR REPLACE INTO drafts VALUES (?, ?)", (row_key(row), row["seq"]))
        else:
            origin = str(row.get("origin"))
            self._db.execute("INSERT INTO lines VALUES (?, ?, ?)", (_name(origin), origin, row["seq"]))
            self._has_lines = True

    def found(
        self, entry: Entry, parts: Sequence[tuple[bytes, Work]], finished: set[bytes]
    ) -> dict[bytes, Work]:
        """The drafts of an entry that are asked again, by their keys; `finished` have an outcome."""
        if isinstance(entry, BadSeed):
            return {}  # it still cannot be read
        line = self._line(entry) if self._has_lines else None
        again: dict[bytes, Work] = {}
        for key, work in parts:
            row = self._db.execute("SELECT seq FROM drafts WHERE key = ?", (key,)).fetchone()
            seq = int(row[0]) if row is not None else None if key in finished else line
            if seq is not None and isinstance(work, Draft):
                again[key] = replace(work, supersedes=seq)
        return again

    def close(self) -> None:
        """Delete the scratch file."""
        self._db.close()
        self._path.unlink(missing_ok=True)

    def _line(self, seed: Seed) -> int | None:
        """The reject of the line that a seed was read from, if that line was not a seed before."""
        query = "SELECT origin, seq FROM lines WHERE name = ?"
        for origin, seq in self._db.execute(query, (_name(seed.origin),)):
            if _is_same_place(origin, seed.origin):
                return int(seq)
        return None


def _draft(row: dict[str, Any]) -> Draft:
    seed = Seed(
        id=row["seed_id"],
        task=row["task"],
        instruction=row["instruction"],
        answer=row["answer"],
        origin=row["origin"],
        metadata=row.get("metadata") or {},
    )
    return Draft(seed, int(row["draft"]), supersedes=int(row["seq"]))


def _name(origin: str) -> str:
    """The last part of an origin: the file's name and the line."""
    return origin.rpartition(os.sep)[2]


def _is_same_place(before: str, now: str) -> bool:
    """Whether two origins name the same line; one may be relative to an unknown directory."""
    one, other = Path(before).parts, Path(now).parts
    if Path(before).is_absolute() and Path(now).is_absolute():
        return one == other
    one, other = (tuple(part for part in parts if part not in ("..", ".")) for parts in (one, other))
    shared = min(len(one), len(other))
    return one[-shared:] == other[-shared:]
