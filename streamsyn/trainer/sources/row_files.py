"""Of a data set with splits only `train` is trained on: of an export, or of what `datasets` has saved.

Rows of files that do not change: JSON lines, Parquet, saved data sets.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import orjson
import structlog

from streamsyn.errors import ConfigError
from streamsyn.io.lines import Line, split_lines
from streamsyn.seeds.files import BATCH_ROWS, plain_chunks
from streamsyn.seeds.reader import find
from streamsyn.trainer.examples import Row
from streamsyn.trainer.sources.source import path_errors

log = structlog.get_logger()

_LISTING = "export.json"
_MADE_BY = b'"made_by": "streamsyn export"'
"""Stands at the beginning of a listing that an export has written."""
_DEPTH = 3
"""An export has its files in data/TASK/ at most."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A file, or one split of a saved data set."""

    path: Path
    whole: Path | None = None
    """The folder of the data set that it belongs to."""
    split: str = ""
    is_train: bool = False


def without_other_splits(paths: Sequence[Path], key: str) -> list[Path]:
    """What of the files and saved data sets is to be read: each of the latter is a single split now.

    Where there is a split `train`, the others of the same data set are left out. Where there is none, all
    are read, as with names of the user's own. Either is said.

    Args:
        paths: What was found.
        key: What the user calls it: `--from`.

    Raises:
        ConfigError: The description of a data set is none.
        OSError: It cannot be read.
    """
    is_export = cache(_is_export)
    parts = [part for path in paths for part in _parts(path, is_export)]
    with_train = {part.whole for part in parts if part.is_train}
    read = [part for part in parts if part.is_train or part.whole not in with_train]
    for whole in dict.fromkeys(part.whole for part in parts if part.whole is not None):
        splits = dict.fromkeys(part.split for part in parts if part.whole == whole)
        taken = dict.fromkeys(part.split for part in read if part.whole == whole)
        if len(splits) > 1:
            left = [split for split in splits if split not in taken]
            log.info("rows.splits", of=key, path=str(whole), read=list(taken), left_out=left)
    return [part.path for part in read]


def _parts(path: Path, is_export: Callable[[Path], bool]) -> Iterator[_Part]:
    if (path / "dataset_dict.json").is_file():
        for name in _saved_splits(path):
            yield _saved_part(path, path / name)
        return
    folders = path.absolute().parents[:_DEPTH]
    whole = next((folder for folder in folders if is_export(folder)), None)
    if path.is_dir():
        in_dict = (folders[0] / "dataset_dict.json").is_file()
        yield _saved_part(folders[0], path) if in_dict else _Part(path)
    elif whole is None:
        yield _Part(path)
    elif path.name != _LISTING:
        split = path.name.rpartition("-")[0] or path.name
        yield _Part(path, whole, split, is_train=split == "train")


def _saved_part(whole: Path, path: Path) -> _Part:
    """A split of a saved data set; where an export went by tasks too, its name begins with that of a task."""
    is_train = "train" in (path.name, path.name.partition(".")[2])
    return _Part(path, whole.absolute(), path.name, is_train=is_train)


def _saved_splits(path: Path) -> list[str]:
    description = path / "dataset_dict.json"
    try:
        return [str(name) for name in orjson.loads(description.read_bytes())["splits"]]
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{description} does not say which splits there are") from error


def _is_export(folder: Path) -> bool:
    listing = folder / _LISTING
    if not listing.is_file():
        return False
    with listing.open("rb") as file:
        return _MADE_BY in file.read(100)


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
