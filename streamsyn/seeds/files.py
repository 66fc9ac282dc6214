"""Seeds in files: each row that the shared reader finds, parsed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from streamsyn.config.sections import SeedsSection
from streamsyn.io.lines import Line
from streamsyn.io.row_reader import BATCH_ROWS, RawRow, ReadOptions, open_rows
from streamsyn.records import Entry
from streamsyn.seeds.parse import SeedParser

_BATCH_DOCUMENTS: Final = 16
"""Rows that are held at once where each is a document, which may be as long as a book."""


class SeedSource(Protocol):
    """Yields batches of entries in a fixed order. Read it in a thread: it may block."""

    def batches(self) -> Iterator[list[Entry]]:
        """The entries, in batches of a bounded size.

        Raises:
            ConfigError: The source cannot be read (any further); the message names it.
        """
        ...

    def fraction(self) -> float | None:
        """The share of the source that has been read, 0..1; None while its size is not known."""
        ...


class FileSource:
    """The seeds of one file or saved dataset.

    Args:
        path: A file of rows, or a directory written by `datasets.save_to_disk`.
        task: The task of seeds that name none; by default the file's stem or the directory's name.
        seeds: The section of the configuration.
        takes_documents: Whether a seed is a document instead of a pair.
    """

    def __init__(
        self, path: Path, task: str | None, seeds: SeedsSection, *, takes_documents: bool = False
    ) -> None:
        self._task = task or _default_task(path)
        self._max_line_bytes = seeds.max_line_bytes
        self._parser = SeedParser(seeds.fields, takes_documents=takes_documents)
        batch_rows = _BATCH_DOCUMENTS if takes_documents else BATCH_ROWS
        self._rows = open_rows(path, ReadOptions(seeds.max_line_bytes, batch_rows))

    def batches(self) -> Iterator[list[Entry]]:
        for batch in self._rows.batches():
            parsed = [self._entry(row, batch.source) for row in batch.rows]
            yield [entry for entry in parsed if entry is not None]

    def fraction(self) -> float | None:
        return self._rows.fraction()

    def _entry(self, row: RawRow, source: str) -> Entry | None:
        source = _printable(source)
        if isinstance(row, Line):
            return self._parser.line(row, source, self._task, self._max_line_bytes)
        origin = f"{source}:{row.number}"
        if row.error is not None:
            return self._parser.unreadable(row.error, origin)
        return self._parser.row(row.value, origin, self._task, b"row")


def _default_task(path: Path) -> str:
    name = _printable(path.name)
    return name if path.is_dir() else name.split(".")[0] or name


def _printable(name: str) -> str:
    """A file's name as the log can hold it: bytes that are not UTF-8 are written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()
