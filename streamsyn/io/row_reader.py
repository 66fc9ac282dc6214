"""The rows of files, in every format that streamsyn reads, each with its place in the file.

`open_rows` picks the reader of a file's format. JSON lines come undecoded (`Line`): a caller can count or
skip them cheaply, and decides what a bad one means. `decode_all` is for callers that refuse a file with a bad
row.
"""

import codecs
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import orjson

from streamsyn.errors import ConfigError
from streamsyn.io.decompression import READ_ERRORS, file_chunks
from streamsyn.io.lines import Line, split_lines
from streamsyn.io.paths import Kind, format_suffix, kind_of

BATCH_ROWS: Final = 256
_TABLE_ERRORS: Final = (OSError, ValueError, LookupError, TypeError)
"""What pyarrow (beside its ArrowException) and `datasets` raise for what they cannot read."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table; `error` is set, and `value` empty, if Python cannot hold one of its values."""

    number: int
    value: dict[str, Any]
    error: Exception | None = None


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
        batch_rows: Rows of a table that are held at once.
        columns: The only columns of a table that are read, each with the key that names it, for messages.
        key: The option or the configuration key that the path was given as, for messages.
    """

    max_line_bytes: int = sys.maxsize
    batch_rows: int = BATCH_ROWS
    columns: Mapping[str, str] = field(default_factory=dict)
    key: str = ""

    def error(self, place: object, problem: str) -> ConfigError:
        """The error that names the key, the place (a file, or `file:row`) and the problem."""
        return ConfigError(f"{self.key}: {place} {problem}" if self.key else f"{place} {problem}")


class RowReader(Protocol):
    """Reads the rows of one file or directory, from its first to its last."""

    def batches(self) -> Iterator[Batch]:
        """All rows, in batches of a bounded size.

        Raises:
            ConfigError: It cannot be read to its end; the rows before that have been yielded.
        """
        ...

    def count(self) -> int:
        """The number of rows without blank lines; the rows are not decoded.

        Raises:
            ConfigError: It cannot be read to its end.
        """
        ...

    def fraction(self) -> float | None:
        """The share that `batches` has read, 0..1; None while the size is not known."""
        ...


def open_rows(path: Path, options: ReadOptions) -> RowReader:
    """The reader of a file, by its name, or of a saved dataset. Plain text has no rows: see `read_text`.

    Raises:
        ConfigError: The file is missing.
    """
    kind = Kind.SAVED if path.is_dir() else kind_of(path)
    match kind:
        case Kind.SAVED:
            return SavedDatasetReader(path, options)
        case Kind.PARQUET:
            return ParquetReader(path, options)
        case _:
            return JsonLinesReader(path, options)


class JsonLinesReader:
    """A file of JSON lines, compressed or not."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._path = path
        self._options = options
        try:
            self._size = path.stat().st_size
        except OSError as error:
            raise options.error(path, f"cannot be read: {error.strerror}") from error
        self._position = 0

    def batches(self) -> Iterator[Batch]:
        source = str(self._path)
        try:
            chunks = file_chunks(self._path, self._note_position)
            for lines in split_lines(chunks, self._options.max_line_bytes):
                yield Batch(source, lines)
        except READ_ERRORS as error:
            raise self._options.error(self._path, f"cannot be read to its end: {error}") from error

    def count(self) -> int:
        return sum(not is_blank(row) for batch in self.batches() for row in batch.rows)

    def fraction(self) -> float | None:
        return self._position / self._size if self._size else 1.0

    def _note_position(self, offset: int) -> None:
        self._position = offset


class ParquetReader:
    """A Parquet file."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._path = path
        self._options = options
        self._read = 0
        self._total: int | None = None

    def batches(self) -> Iterator[Batch]:
        import pyarrow
        import pyarrow.parquet

        self._read = 0
        columns = self._options.columns
        try:
            with pyarrow.parquet.ParquetFile(self._path) as file:
                self._total = file.metadata.num_rows
                self._check_columns(file.schema_arrow.names)
                for table in file.iter_batches(self._options.batch_rows, columns=list(columns) or None):
                    first = self._read + 1
                    self._read += table.num_rows
                    yield Batch(str(self._path), list(_table_rows(table, first)))
        except (*_TABLE_ERRORS, pyarrow.ArrowException) as error:
            raise self._error(error) from error

    def count(self) -> int:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self._path) as file:
                return int(file.metadata.num_rows)
        except (*_TABLE_ERRORS, pyarrow.ArrowException) as error:
            raise self._error(error) from error

    def fraction(self) -> float | None:
        return None if self._total is None else self._read / max(1, self._total)

    def _check_columns(self, names: Sequence[str]) -> None:
        for name, key in self._options.columns.items():
            if name not in names:
                problem = f"has no column {name!r}, which {key} names; it has {', '.join(names) or 'none'}"
                raise self._options.error(self._path, problem)

    def _error(self, error: Exception) -> ConfigError:
        return self._options.error(self._path, f"cannot be read to its end as Parquet: {error}")


class SavedDatasetReader:
    """A directory written by `datasets.save_to_disk`; of a DatasetDict all splits, one after the other."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._path = path
        self._options = options
        self._read = 0
        self._total: int | None = None

    def batches(self) -> Iterator[Batch]:
        self._read = 0
        splits = self._load()
        self._total = sum(map(len, splits.values()))
        for name, split in splits.items():
            source = f"{self._path}[{name}]" if name else str(self._path)
            tables = split.with_format("arrow")
            for start in range(0, len(split), self._options.batch_rows):
                try:
                    table = tables[start : start + self._options.batch_rows]
                except _TABLE_ERRORS as error:
                    raise self._error(error) from error
                self._read += table.num_rows
                yield Batch(source, list(_table_rows(table, start + 1)))

    def count(self) -> int:
        return sum(map(len, self._load().values()))

    def fraction(self) -> float | None:
        return None if self._total is None else self._read / max(1, self._total)

    def _load(self) -> dict[str, Any]:
        """The splits by name; one without a name if there are none."""
        import datasets

        try:
            saved = datasets.load_from_disk(str(self._path))
        except _TABLE_ERRORS as error:
            raise self._error(error) from error
        return {"": saved} if isinstance(saved, datasets.Dataset) else dict(saved)

    def _error(self, error: Exception) -> ConfigError:
        return self._options.error(self._path, f"cannot be read as a saved dataset: {error}")


def _table_rows(table: Any, first: int) -> Iterator[TableRow]:
    """The rows of an Arrow table; a value that Python cannot hold spoils its own row alone."""
    try:
        rows = table.to_pylist()
    except (ValueError, OverflowError) as error:
        if table.num_rows == 1:
            yield TableRow(first, {}, error)
            return
        for at in range(table.num_rows):
            yield from _table_rows(table.slice(at, 1), first + at)
        return
    for number, row in enumerate(rows, first):
        yield TableRow(number, row)


def is_blank(row: RawRow) -> bool:
    """Whether a row is a line of white space alone: it counts for line numbers only."""
    return isinstance(row, Line) and row.text is not None and not row.text.strip()


def decode_all(path: Path, options: ReadOptions, *, documents: bool = False) -> Iterator[tuple[str, Any]]:
    """Every row of a file decoded, with its place as `file:number`.

    Args:
        path: A file of rows or a saved dataset.
        options: How to read it.
        documents: Take a `.json` file that is one JSON document over several lines for one row.

    Raises:
        ConfigError: A row is longer than the limit or cannot be decoded, or the file cannot be read.
    """
    for batch in open_rows(path, options).batches():
        for row in batch.rows:
            if is_blank(row):
                continue
            where = f"{batch.source}:{row.number}"
            if isinstance(row, TableRow):
                if row.error is not None:
                    raise options.error(where, f"cannot be read: {row.error}")
                yield where, row.value
                continue
            if row.text is None:
                raise options.error(where, f"is longer than {options.max_line_bytes} bytes")
            try:
                value = orjson.loads(row.text)
            except orjson.JSONDecodeError as error:
                if not (documents and row.number == 1 and format_suffix(path) == ".json"):
                    raise _invalid_json(where, options, error) from error
                yield where, _document(path, options)
                return
            yield where, value


def _document(path: Path, options: ReadOptions) -> Any:
    text = "".join(read_text(path, options))
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise _invalid_json(f"{path}:{error.lineno}", options, error) from error


def _invalid_json(where: str, options: ReadOptions, error: orjson.JSONDecodeError) -> ConfigError:
    return options.error(where, f"is not valid JSON: {error}")


def read_text(path: Path, options: ReadOptions) -> Iterator[str]:
    """The text of a file in UTF-8, compressed or not, in pieces that may end anywhere.

    Raises:
        ConfigError: It cannot be read to its end, or is not valid UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        for chunk in file_chunks(path):
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise options.error(path, f"is not valid UTF-8: {error}") from error
    except READ_ERRORS as error:
        raise options.error(path, f"cannot be read to its end: {error}") from error
