"""Seeds in files: each row that the shared reader finds, parsed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from streamsyn.config.sections import SeedsSection
from streamsyn.io.inputs import open_rows
from streamsyn.io.places import Place, RemoteFile
from streamsyn.io.rows import BATCH_ROWS, Line, RawRow, ReadOptions
from streamsyn.records import Entry
from streamsyn.seeds.forms import FormsSeen
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
    """The seeds of one file or dataset.

    Args:
        place: The file or dataset.
        task: The task of seeds that name none; by default the file's stem or the dataset's name.
        seeds: The section of the configuration.
        takes_documents: Whether a seed is a document instead of a pair.
        seen: Counts the forms of rows.
    """

    def __init__(
        self,
        place: Place,
        task: str | None,
        seeds: SeedsSection,
        *,
        takes_documents: bool = False,
        seen: FormsSeen | None = None,
    ) -> None:
        self._task = task or _default_task(place)
        self._max_line_bytes = seeds.max_line_bytes
        self._parser = SeedParser(seeds.fields, form=seeds.format, takes_documents=takes_documents, seen=seen)
        batch_rows = _BATCH_DOCUMENTS if takes_documents else BATCH_ROWS
        self._rows = open_rows(place, ReadOptions(seeds.max_line_bytes, batch_rows))

    def batches(self) -> Iterator[list[Entry]]:
        for batch in self._rows.batches():
            parsed = [self._entry(row, batch.source) for row in batch.rows]
            yield [entry for entry in parsed if entry is not None]

    def check(self) -> None:
        """Look at the beginning of a local file.

        Raises:
            ConfigError: It is wrong as a whole: of a different format or encoding.
        """
        self._rows.check()

    def fraction(self) -> float | None:
        return self._rows.fraction()

    def _entry(self, row: RawRow, source: str) -> Entry | None:
        source = _printable(source)
        if isinstance(row, Line):
            return self._parser.line(row, source, self._task, self._max_line_bytes)
        return self._parser.table_row(row, f"{source}:{row.number}", self._task)


def _default_task(place: Place) -> str:
    name = _printable(place.name)
    is_file = isinstance(place, RemoteFile) or (isinstance(place, Path) and not place.is_dir())
    return (name.split(".")[0] if is_file else name) or name


def _printable(name: str) -> str:
    """A file's name as the log can hold it: bytes that are not UTF-8 are written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()
