"""Rows of files and datasets that do not change, in every format that seeds have.

Of a dataset with splits, an export or a DatasetDict, only `train` is read where there is one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Final, TypeAlias

import orjson
import structlog

from streamsyn.errors import ConfigError
from streamsyn.io.inputs import find_rows, open_rows
from streamsyn.io.json_rows import decode_json
from streamsyn.io.places import Place
from streamsyn.io.rows import RawRow, ReadOptions, RowReader, TableRow, is_blank
from streamsyn.trainer.examples import BadRow, Row
from streamsyn.trainer.sources.source import path_errors

log = structlog.get_logger()

MAX_LINE_BYTES: Final = 64 * 2**20
"""A longer line is dropped without being held in memory."""
_EXPORT_LISTING: Final = "export.json"
_EXPORT_MARK: Final = b'"made_by": "streamsyn export"'
"""Near the beginning of a listing that an export has written."""
_EXPORT_DEPTH: Final = 3
"""An export has its files in data/TASK/ at most."""

_Placed: TypeAlias = tuple[str, RawRow]
"""The place of a row, as `file:line`, and the row, which is not decoded before it is wanted."""


class FileRows:
    """Source: the rows of a file or a dataset, or of all in a directory or a glob, sorted by name.

    Args:
        path: The file, saved dataset, directory, glob, URL or name on the hub.
        name: Identifies the source in keys.
        key: The option or the configuration key of the path, for messages: `train.mix`.
        count: Count the rows before the first is read, so that the total is known from the beginning.

    Raises:
        ConfigError: There is nothing to read.
    """

    def __init__(self, path: str, name: str, key: str, *, count: bool) -> None:
        self.name = name
        self._options = ReadOptions(MAX_LINE_BYTES, key=key)
        found = find_rows(path, key).places
        with path_errors(f"{key}:", path):
            self._paths = without_other_splits(found, key)
        if not self._paths:
            raise ConfigError(f"{key}: there are no rows in {path}")
        self._count = count
        self._total: int | None = None
        self._next = 0
        self._rows: Iterator[_Placed] = self._all()

    def fetch(self, first: int, limit: int) -> list[Row]:
        if first != self._next:
            self._rows = islice(self._all(), first, None)
        found = [_decoded(placed) for placed in islice(self._rows, limit)]
        self._next = first + len(found)
        if len(found) < limit:
            self._total = self._next
        return found

    def total(self) -> int | None:
        if self._total is None and self._count:
            self._total = sum(reader.count() for reader in self._readers())
        return self._total

    def pick(self, seqs: Sequence[int]) -> Iterator[Row]:
        wanted = set(seqs)
        for seq, placed in enumerate(self._all()):
            if seq in wanted:
                yield _decoded(placed)
            if seq == seqs[-1]:
                return
        self._total = self._total or 0  # there are fewer rows than before

    def placed(self) -> Iterator[tuple[str, Row]]:
        """All rows, each with its place as `file:line`."""
        for placed in self._all():
            yield placed[0], _decoded(placed)

    async def changed(self, timeout_s: float) -> None:
        """Return at once: all rows are there from the beginning."""

    def close(self) -> None:
        """Do nothing: each file is closed by its iterator."""

    def _readers(self) -> Iterator[RowReader]:
        return (open_rows(path, self._options) for path in self._paths)

    def _all(self) -> Iterator[_Placed]:
        for reader in self._readers():
            for batch in reader.batches():
                for row in batch.rows:
                    if not is_blank(row):
                        yield f"{batch.source}:{row.number}", row


def _decoded(placed: _Placed) -> Row:
    place, row = placed
    if isinstance(row, TableRow):
        return row.value if row.error is None else BadRow(f"{place} cannot be read")
    if row.text is None:
        return BadRow(f"{place} is longer than {MAX_LINE_BYTES} bytes")
    try:
        value = decode_json(row.text)
    except orjson.JSONDecodeError as error:
        return BadRow(f"{place} is not valid JSON: {error}")
    if isinstance(value, dict):
        return value
    return BadRow(f"{place} is not a JSON object but {type(value).__name__}")


def without_other_splits(places: Sequence[Place], key: str) -> list[Place]:
    """The files, and the saved datasets split by split, that are to be read.

    Where a dataset has a split `train`, its other splits are left out; where it has none (splits by task,
    or with names of the user's own), all are read. Either is logged.

    Args:
        places: Files and datasets; what does not lie on this machine is read as it is.
        key: The option or the configuration key that they were given as, for messages.

    Raises:
        ConfigError: The description of a saved dataset is invalid.
        OSError: It cannot be read.
    """
    is_export = cache(_is_export)
    parts = [part for place in places for part in _parts(place, is_export)]
    with_train = {part.dataset for part in parts if part.is_train}
    read = [part for part in parts if part.is_train or part.dataset not in with_train]
    for dataset in dict.fromkeys(part.dataset for part in parts if part.dataset is not None):
        splits = dict.fromkeys(part.split for part in parts if part.dataset == dataset)
        taken = dict.fromkeys(part.split for part in read if part.dataset == dataset)
        if len(splits) > 1:
            left_out = [split for split in splits if split not in taken]
            log.info("rows.splits", of=key, path=str(dataset), read=list(taken), left_out=left_out)
    return [part.path for part in read]


@dataclass(frozen=True, slots=True)
class _Part:
    """A file, or one split of a saved dataset.

    Attributes:
        path: Where it is.
        dataset: The directory of the dataset with splits that it belongs to, if it does.
        split: The name of its split.
        is_train: Whether that is the split to train on.
    """

    path: Place
    dataset: Path | None = None
    split: str = ""
    is_train: bool = False


def _parts(path: Place, is_export: Callable[[Path], bool]) -> Iterator[_Part]:
    if not isinstance(path, Path):
        yield _Part(path)
        return
    if (path / "dataset_dict.json").is_file():
        for name in _saved_splits(path):
            yield _saved_part(path, path / name)
        return
    folders = path.absolute().parents[:_EXPORT_DEPTH]
    export = next((folder for folder in folders if is_export(folder)), None)
    if path.is_dir():
        in_dict = (folders[0] / "dataset_dict.json").is_file()
        yield _saved_part(folders[0], path) if in_dict else _Part(path)
    elif export is None:
        yield _Part(path)
    elif path.name != _EXPORT_LISTING:
        split = path.name.rpartition("-")[0] or path.name
        yield _Part(path, export, split, is_train=split == "train")


def _saved_part(dataset: Path, path: Path) -> _Part:
    """A split of a saved dataset; in an export by tasks its name is TASK.SPLIT."""
    is_train = "train" in (path.name, path.name.partition(".")[2])
    return _Part(path, dataset.absolute(), path.name, is_train=is_train)


def _saved_splits(path: Path) -> list[str]:
    description = path / "dataset_dict.json"
    try:
        return [str(name) for name in orjson.loads(description.read_bytes())["splits"]]
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{description} has no valid list of `splits`") from error


def _is_export(folder: Path) -> bool:
    listing = folder / _EXPORT_LISTING
    if not listing.is_file():
        return False
    with listing.open("rb") as file:
        return _EXPORT_MARK in file.read(100)
