"""Rows of CSV and TSV files: the first line names the fields, each value is text."""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Final

from streamsyn.io.content import read_text
from streamsyn.io.places import RemoteFile
from streamsyn.io.rows import Batch, ReadOptions, TableRow

_MAX_FIELD_CHARS: Final = 2**31 - 1


class DelimitedReader:
    """A CSV or TSV file, compressed or not. Quoted values may have several lines.

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
                    yield _row(first, names, values)
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


def _row(number: int, names: Sequence[str], values: Sequence[str]) -> TableRow:
    if len(values) > len(names):
        return TableRow(
            number, {}, ValueError(f"it has {len(values)} values, and there are {len(names)} columns")
        )
    return TableRow(number, dict(zip(names, values, strict=False)))
