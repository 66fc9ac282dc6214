"""Rows of files that do not change: JSON lines, Parquet, saved data sets."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import orjson

from streamsyn.errors import ConfigError
from streamsyn.seeds.files import BATCH_ROWS, plain_chunks
from streamsyn.seeds.lines import Line, split_lines
from streamsyn.seeds.reader import find
from streamsyn.trainer.sources.places import path_errors
from streamsyn.trainer.sources.splits import without_other_splits
from streamsyn.trainer.stream.examples import Row

MAX_LINE_BYTES = 64 * 2**20
"""A longer line is dropped without being held in memory."""

_Raw: TypeAlias = tuple[str, Line | dict[str, Any] | None]
"""Where a row stands, as `file:line`, and the row, which is not decoded before it is wanted."""


class FileRows:
    """Source: the rows of a file, a saved data set, or all below a directory or of a glob, in order of names.

    Of an export, and of a saved data set with splits, only `train` is read, if there is one.

    Args:
        path: Where they are.
        name: Stands for the source in keys.
        key: What the user calls it, for messages: `train.mix`.
        count: Count the rows before the first is read, so that the end is known from the beginning.

    Raises:
        ConfigError: There is nothing to read.
    """

    def __init__(self, path: str, name: str, key: str, *, count: bool) -> None:
        self.name = name
        self._key = key
        found = find_rows(path, key)
        with path_errors(f"{key}:", path):
            self._paths = without_other_splits(found, key)
        if not self._paths:
            raise ConfigError(f"{key}: there are no rows in {path}")
        self._count = count
        self._total: int | None = None
        self._next = 0
        self._rows: Iterator[_Raw] = self._all()

    def fetch(self, first: int, limit: int) -> list[Row]:
        if first != self._next:
            self._rows = islice(self._all(), first, None)
        found = [_row(first + at, raw) for at, raw in enumerate(islice(self._rows, limit))]
        self._next = first + len(found)
        if len(found) < limit:
            self._total = self._next
        return found

    def total(self) -> int | None:
        if self._total is None and self._count:
            self._total = sum(map(self._count_rows, self._paths))
        return self._total

    def pick(self, seqs: Sequence[int]) -> Iterator[Row]:
        wanted = set(seqs)
        for seq, raw in enumerate(self._all()):
            if seq in wanted:
                yield _row(seq, raw)
            if seq == seqs[-1]:
                return
        self._total = self._total or 0  # fewer rows than there were

    def placed(self) -> Iterator[tuple[str, Row]]:
        """All rows, each with where it stands: `file:line`."""
        for seq, raw in enumerate(self._all()):
            yield raw[0], _row(seq, raw)

    async def changed(self, timeout_s: float) -> None:
        """All is there from the beginning."""

    def close(self) -> None:
        """Files are closed with what reads them."""

    def _all(self) -> Iterator[_Raw]:
        for path in self._paths:
            with self._translated(path):
                yield from _rows_of(path)

    def _count_rows(self, path: Path) -> int:
        with self._translated(path):
            return _count_rows(path)

    @contextmanager
    def _translated(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, ValueError, LookupError, TypeError, zlib.error) as error:
            raise ConfigError(f"{self._key}: {path} cannot be read to its end: {error}") from error


def find_rows(path: str, key: str) -> list[Path]:
    """The files and saved data sets that `path` names; `key` is what the user calls it.

    Raises:
        ConfigError: There is nothing, or something of no known kind.
    """
    try:
        return find(path)
    except ConfigError as error:
        raise ConfigError(str(error).replace("seeds:", f"{key}:", 1)) from error


def _rows_of(path: Path) -> Iterator[_Raw]:
    if path.is_dir():
        return _of_saved(path)
    return _of_parquet(path) if path.suffix == ".parquet" else _of_lines(path)


def _count_rows(path: Path) -> int:
    """How many `_rows_of` would be, without decoding them."""
    if path.is_dir():
        return len(_saved(path))
    if path.suffix == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            return int(file.metadata.num_rows)
    return sum(1 for _ in _of_lines(path))


def _of_lines(path: Path) -> Iterator[_Raw]:
    with path.open("rb") as raw:
        for lines in split_lines(plain_chunks(path.suffix, raw), MAX_LINE_BYTES):
            for line in lines:
                if line.text is None or line.text.strip():
                    yield f"{path}:{line.number}", line


def _of_parquet(path: Path) -> Iterator[_Raw]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        first = 1
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            yield from _of_table(batch, str(path), first)
            first += batch.num_rows


def _of_saved(path: Path) -> Iterator[_Raw]:
    saved = _saved(path)
    tables = saved.with_format("arrow")
    for start in range(0, len(saved), BATCH_ROWS):
        yield from _of_table(tables[start : start + BATCH_ROWS], str(path), start + 1)


def _saved(path: Path) -> Any:
    """A saved data set without splits, or one split."""
    import datasets

    return datasets.load_from_disk(str(path))


def _of_table(table: Any, where: str, first: int) -> Iterator[_Raw]:
    """The rows of an Arrow table; a value that Python cannot hold spoils its own row alone."""
    try:
        rows = table.to_pylist()
    except (ValueError, OverflowError):
        if table.num_rows == 1:
            yield f"{where}:{first}", None
            return
        for at in range(table.num_rows):
            yield from _of_table(table.slice(at, 1), where, first + at)
        return
    for number, row in enumerate(rows, first):
        yield f"{where}:{number}", row


def _row(seq: int, raw: _Raw) -> Row:
    where, row = raw
    if isinstance(row, dict):
        return Row(seq, row)
    if row is None or row.text is None:
        return Row(seq, None, f"{where} cannot be read" if row is None else f"{where} is too long")
    try:
        value = orjson.loads(row.text)
    except orjson.JSONDecodeError as error:
        return Row(seq, None, f"{where} is no JSON: {error}")
    if isinstance(value, dict):
        return Row(seq, value)
    return Row(seq, None, f"{where} is no JSON object but {type(value).__name__}")
