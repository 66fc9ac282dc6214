"""Rows and their places: lines cut from a byte stream, rows of tables, and the interface of their readers."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from streamsyn.errors import ConfigError
from streamsyn.io.places import RemoteFile, size_of

BOM: Final = b"\xef\xbb\xbf"
BATCH_ROWS: Final = 256


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its line end.

    Attributes:
        number: Counts from 1.
        text: None if the line was longer than allowed.
        size: Its length in bytes, without the LF.
    """

    number: int
    text: bytes | None
    size: int


@dataclass(frozen=True, slots=True)
class TableRow:
    """One decoded row.

    Attributes:
        number: Counts from 1 in its source; of a delimited file, the number of its first line.
        value: The fields by name.
        error: Why the row cannot be read; `value` is empty then.
        unreadable: Fields with a value that Python cannot hold, and why; `value` has it as text.
    """

    number: int
    value: dict[str, Any]
    error: Exception | None = None
    unreadable: Mapping[str, Exception] = field(default_factory=dict)


RawRow: TypeAlias = Line | TableRow


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive rows of one file or split.

    Attributes:
        source: The file, or `directory[split]`: `source:number` is the place of a row.
        rows: The rows, numbered from 1 in their source; blank lines are among them and count too.
    """

    source: str
    rows: Sequence[RawRow]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How files are read.

    Attributes:
        max_line_bytes: A longer line is counted, not held in memory.
        batch_rows: Rows that are held at once, at most.
        columns: The only columns of a table that are read, each with the key that names it, for messages.
        key: The option or the configuration key that the path was given as, for messages.
        documents: Take a file that is one JSON object over several lines for one row.
        all_splits: Read all splits of a dataset on the hub, not only `train`.
    """

    max_line_bytes: int = sys.maxsize
    batch_rows: int = BATCH_ROWS
    columns: Mapping[str, str] = field(default_factory=dict)
    key: str = ""
    documents: bool = False
    all_splits: bool = False

    def error(self, place: object, problem: str) -> ConfigError:
        """The error that names the key, the place (a file, or `file:row`) and the problem."""
        return ConfigError(f"{self.key}: {place} {problem}" if self.key else f"{place} {problem}")

    def size_of(self, place: Path | RemoteFile) -> int | None:
        """The size of a file in bytes; None if its server does not tell.

        Raises:
            ConfigError: It cannot be found.
        """
        try:
            return size_of(place)
        except OSError as error:
            raise self.error(place, f"cannot be read: {error.strerror or error}") from error


class RowReader(Protocol):
    """Reads the rows of one file or dataset, from its first to its last."""

    def batches(self) -> Iterator[Batch]:
        """All rows, in batches of a bounded size.

        Raises:
            ConfigError: It cannot be read to its end; the rows before that have been yielded.
        """
        ...

    def check(self) -> None:
        """Look at the beginning of a local file; what lies elsewhere is not looked at.

        Raises:
            ConfigError: The file is wrong as a whole: of a different format or encoding.
        """
        ...

    def count(self) -> int:
        """The number of rows without blank lines; lines are not decoded.

        Raises:
            ConfigError: It cannot be read to its end.
        """
        ...

    def fraction(self) -> float | None:
        """The share that `batches` has read, 0..1; None while the size is not known."""
        ...


def is_blank(row: RawRow) -> bool:
    """Whether a row is a line of white space alone: it counts for line numbers only."""
    return isinstance(row, Line) and row.text is not None and not row.text.strip()


class LineSplitter:
    """Cuts a stream of byte chunks into lines; holds at most one line, and none above the limit.

    Accepts LF and CRLF, a byte order mark before the first line, and a last line without a line end.

    Args:
        max_line_bytes: The longest line that is kept, without its LF.
    """

    def __init__(self, max_line_bytes: int) -> None:
        self._max = max_line_bytes
        self._number = 0
        self._parts: list[bytes] = []
        self._size = 0

    @property
    def endless_line(self) -> int | None:
        """The number of the line whose end has not come yet, if it is above the limit already."""
        return self._number + 1 if self._size > self._max else None

    def feed(self, chunk: bytes) -> Iterator[Line]:
        """The lines that `chunk` completes."""
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            self._keep(piece)
            yield self._take()
        self._keep(rest)

    def finish(self) -> Iterator[Line]:
        """The last line, if it has no line end."""
        if self._size:
            yield self._take()

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._max:
            self._parts.clear()  # a line above the limit is counted, not held
        elif piece:
            self._parts.append(piece)

    def _take(self) -> Line:
        self._number += 1
        text = b"".join(self._parts) if self._size <= self._max else None
        line = Line(self._number, text, self._size)
        self._parts.clear()
        self._size = 0
        if text is None:
            return line
        if self._number == 1:
            text = text.removeprefix(BOM)
        return Line(line.number, text.removesuffix(b"\r"), line.size)


def split_lines(chunks: Iterable[bytes], max_line_bytes: int) -> Iterator[list[Line]]:
    """The lines of a whole stream; each batch holds the lines that one chunk completes."""
    splitter = LineSplitter(max_line_bytes)
    for chunk in chunks:
        if lines := list(splitter.feed(chunk)):
            yield lines
    if last := list(splitter.finish()):
        yield last
