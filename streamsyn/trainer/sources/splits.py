"""Of a data set with splits only `train` is trained on: of an export, or of what `datasets` has saved."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import orjson
import structlog

from streamsyn.errors import ConfigError

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
            yield _saved(path, path / name)
        return
    folders = path.absolute().parents[:_DEPTH]
    whole = next((folder for folder in folders if is_export(folder)), None)
    if path.is_dir():
        in_dict = (folders[0] / "dataset_dict.json").is_file()
        yield _saved(folders[0], path) if in_dict else _Part(path)
    elif whole is None:
        yield _Part(path)
    elif path.name != _LISTING:
        split = path.name.rpartition("-")[0] or path.name
        yield _Part(path, whole, split, is_train=split == "train")


def _saved(whole: Path, path: Path) -> _Part:
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
