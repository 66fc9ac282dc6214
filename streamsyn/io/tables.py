"""Rows of tables: CSV, TSV and Parquet files, saved datasets and datasets on the hub."""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Final

from streamsyn.io.content import problem_of, read_text
from streamsyn.io.places import HubDataset, RemoteFile, RemoteSaved, opened, reason
from streamsyn.io.rows import Batch, ReadOptions, TableRow

_MAX_FIELD_CHARS: Final = 2**31 - 1
_TABLE_ERRORS: Final = (OSError, ValueError, LookupError, TypeError)
"""What pyarrow (beside its ArrowException) and `datasets` raise for what they cannot read."""


class DelimitedReader:
    """A CSV or TSV file, compressed or not: the first line names the fields, each value is text.

    Quoted values may have several lines.

    Args:
        place: The file.
        options: How to read it.
        delimiter: The delimiter; None finds it in the first line: a comma, a semicolon or a tab.
    """

    def __init__(self, place: Path | RemoteFile, options: ReadOptions, delimiter: str | None) -> None:
        self._place = place
        self._options = options
        self._delimiter = delimiter
        self._size = options.size_of(place)
        self._position = 0

    def batches(self) -> Iterator[Batch]:
        source = str(self._place)
        batch: list[TableRow] = []
        for row in self._rows():
            batch.append(row)
            if len(batch) >= self._options.batch_rows:
                yield Batch(source, batch)
                batch = []
        if batch:
            yield Batch(source, batch)

    def check(self) -> None:
        if isinstance(self._place, Path):
            next(self._rows(), None)

    def count(self) -> int:
        return sum(1 for _ in self._rows())

    def fraction(self) -> float | None:
        if self._size is None:
            return None
        return self._position / self._size if self._size else 1.0

    def _rows(self) -> Iterator[TableRow]:
        csv.field_size_limit(min(self._options.max_line_bytes, _MAX_FIELD_CHARS))
        lines = self._lines()
        header = next(lines, "")
        if not header:
            return
        delimiter = self._delimiter or max(",;\t", key=header.count)
        reader = csv.reader(chain([header], lines), delimiter=delimiter)
        try:
            names = [name.strip() for name in next(reader)]
            self._check(names)
            first = reader.line_num + 1
            for values in reader:
                if values:
                    yield _delimited_row(first, names, values)
                first = reader.line_num + 1
        except csv.Error as error:
            place = f"{self._place}:{reader.line_num}"
            raise self._options.error(place, f"cannot be read as delimited text: {error}") from error

    def _check(self, names: Sequence[str]) -> None:
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise self._options.error(self._place, f"has two columns of the name {twice[0]!r}")
        for name, key in self._options.columns.items():
            if name not in names:
                problem = f"has no column {name!r}, which {key} names; it has {', '.join(names)}"
                raise self._options.error(self._place, problem)

    def _lines(self) -> Iterator[str]:
        """The lines with their ends."""
        rest = ""
        for text in read_text(self._place, self._options, self._note_position, of_rows=True):
            *lines, rest = (rest + text).split("\n")
            yield from (f"{line}\n" for line in lines)
        if rest:
            yield rest

    def _note_position(self, offset: int) -> None:
        self._position = offset


def _delimited_row(number: int, names: Sequence[str], values: Sequence[str]) -> TableRow:
    if len(values) > len(names):
        return TableRow(
            number, {}, ValueError(f"it has {len(values)} values, and there are {len(names)} columns")
        )
    return TableRow(number, dict(zip(names, values, strict=False)))


class ParquetReader:
    """A Parquet file."""

    def __init__(self, place: Path | RemoteFile, options: ReadOptions) -> None:
        self._place = place
        self._options = options
        self._read = 0
        self._total: int | None = None

    def batches(self) -> Iterator[Batch]:
        self._read = 0
        columns = self._options.columns
        with self._errors(), self._opened() as file:
            self._total = file.metadata.num_rows
            self._check_columns(file.schema_arrow.names)
            for table in file.iter_batches(self._options.batch_rows, columns=list(columns) or None):
                first = self._read + 1
                self._read += table.num_rows
                yield Batch(str(self._place), list(table_rows(table, first)))

    def check(self) -> None:
        if isinstance(self._place, Path):
            self.count()

    def count(self) -> int:
        with self._errors(), self._opened() as file:
            return int(file.metadata.num_rows)

    def fraction(self) -> float | None:
        return None if self._total is None else self._read / max(1, self._total)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        import pyarrow.parquet

        if isinstance(self._place, Path):
            with pyarrow.parquet.ParquetFile(self._place) as file:
                yield file
            return
        with opened(self._place) as remote, pyarrow.parquet.ParquetFile(remote) as file:
            yield file

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (*_TABLE_ERRORS, pyarrow.ArrowException) as error:
            raise self._options.error(self._place, self._problem(error)) from error

    def _problem(self, error: Exception) -> str:
        cannot = f"cannot be read to its end as Parquet: {error}"
        try:
            with opened(self._place) as file:
                head = file.read(100)
        except OSError:
            return cannot
        return cannot if head.startswith(b"PAR1") else problem_of(head) or cannot

    def _check_columns(self, names: Sequence[str]) -> None:
        for name, key in self._options.columns.items():
            if name not in names:
                problem = f"has no column {name!r}, which {key} names; it has {', '.join(names) or 'none'}"
                raise self._options.error(self._place, problem)


class SavedDatasetReader:
    """A directory written by `datasets.save_to_disk`; of a DatasetDict all splits, one after the other."""

    def __init__(self, place: Path | RemoteSaved, options: ReadOptions) -> None:
        self._place = place
        self._options = options
        self._read = 0
        self._total: int | None = None

    def batches(self) -> Iterator[Batch]:
        self._read = 0
        splits = self._load()
        self._total = sum(map(len, splits.values()))
        for name, split in splits.items():
            source = f"{self._place}[{name}]" if name else str(self._place)
            tables = split.with_format("arrow")
            for start in range(0, len(split), self._options.batch_rows):
                try:
                    table = tables[start : start + self._options.batch_rows]
                except _TABLE_ERRORS as error:
                    raise self._error(error) from error
                self._read += table.num_rows
                yield Batch(source, list(table_rows(table, start + 1)))

    def check(self) -> None:
        """Do nothing: `datasets` checks a directory when it is opened, which takes its import."""

    def count(self) -> int:
        return sum(map(len, self._load().values()))

    def fraction(self) -> float | None:
        return None if self._total is None else self._read / max(1, self._total)

    def _load(self) -> dict[str, Any]:
        """The splits by name; one without a name if there are none."""
        import datasets

        location = str(self._place) if isinstance(self._place, Path) else self._place.location
        try:
            saved = datasets.load_from_disk(location)
        except _TABLE_ERRORS as error:
            raise self._error(error) from error
        return {"": saved} if isinstance(saved, datasets.Dataset) else dict(saved)

    def _error(self, error: Exception) -> Exception:
        return self._options.error(self._place, f"cannot be read as a saved dataset: {error}")


class HubReader:
    """A dataset on the Hugging Face hub, as `datasets` streams it: nothing is kept on this machine.

    Without a split in its name, only `train` is read where there is one, unless `options.all_splits`.
    """

    def __init__(self, place: HubDataset, options: ReadOptions) -> None:
        self._place = place
        self._options = options

    def batches(self) -> Iterator[Batch]:
        with self._errors():
            splits = self._load()
        for name, split in splits.items():
            number = 1
            tables = iter(split.with_format("arrow").iter(self._options.batch_rows))
            while True:
                with self._errors():
                    table = next(tables, None)
                if table is None:
                    break
                yield Batch(f"{self._place}[{name}]", list(table_rows(table, number)))
                number += table.num_rows

    def check(self) -> None:
        """Do nothing: the hub is asked when the rows are read."""

    def count(self) -> int:
        return sum(len(batch.rows) for batch in self.batches())

    def fraction(self) -> float | None:
        return None

    def _load(self) -> dict[str, Any]:
        """The splits to read, by name."""
        import datasets

        hub = self._place.hub
        loaded = datasets.load_dataset(hub.repository, hub.config, split=hub.split, streaming=True)
        if hub.split is not None:
            return {hub.split: loaded}
        splits = dict(loaded)
        return splits if self._options.all_splits or "train" not in splits else {"train": splits["train"]}

    @contextmanager
    def _errors(self) -> Iterator[None]:
        # `datasets` and what it asks the hub with raise errors of many kinds.
        try:
            yield
        except Exception as error:
            name = self._place.hub.repository
            problem = f"does not exist here, and cannot be read from the Hugging Face hub: {reason(error)}"
            raise self._options.error(name, problem) from error


def table_rows(table: Any, first: int) -> Iterator[TableRow]:
    """The rows of an Arrow table; a value that Python cannot hold is replaced by text in its row alone."""
    try:
        rows = table.to_pylist()
    except (ValueError, OverflowError):
        if table.num_rows == 1:
            yield _row_by_value(table, first)
            return
        for at in range(table.num_rows):
            yield from table_rows(table.slice(at, 1), first + at)
        return
    for number, row in enumerate(rows, first):
        yield TableRow(number, row)


def _row_by_value(table: Any, number: int) -> TableRow:
    value: dict[str, Any] = {}
    unreadable: dict[str, Exception] = {}
    for name in table.schema.names:
        scalar = table.column(name)[0]
        try:
            value[name] = scalar.as_py()
        except (ValueError, OverflowError) as error:
            unreadable[name] = error
            value[name] = _as_text(scalar)
    return TableRow(number, value, unreadable=unreadable)


def _as_text(scalar: Any) -> str:
    """A value that Python cannot hold: bytes that are not UTF-8 with escapes, a time as Arrow writes it."""
    import pyarrow

    try:
        if isinstance(scalar, pyarrow.StringScalar | pyarrow.LargeStringScalar):
            return bytes(scalar.as_buffer()).decode(errors="backslashreplace")
        return str(scalar.cast(pyarrow.string()).as_py())
    except (ValueError, pyarrow.ArrowException):
        return f"a value of type {scalar.type}"
