"""What the paths of a training lead to, without opening anything."""

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path

from streamsyn.errors import ConfigError
from streamsyn.seeds.files import is_run_directory, is_seed_file
from streamsyn.sink.log import KINDS

_FOLDERS_OF_A_RUN = (*KINDS, "index", "spool")
_FILES_OF_A_TRAINING = (
    "train.json",
    "metrics.jsonl",
    "model/config.json",
    "answers/step-0000001.jsonl",
    "checkpoints/step-0000001/info.json",
    "checkpoints/step-0000001/model/config.json",
)
"""One for each depth and kind of those that could be taken for rows."""


@contextmanager
def path_errors(flag: str, path: object) -> Iterator[None]:
    """Within, what the system says of a path is the user's to mend.

    Raises:
        ConfigError: A path cannot be looked at: names too long, folders that are not ours to read.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from error


def is_run(stream: str, out: Path) -> bool:
    """Whether `--from` is a run directory, or the place of one that is still to come."""
    path = Path(stream)
    if is_run_directory(path):
        return True
    if path.is_dir():
        return _may_become_one(path, out)
    return not (path.exists() or glob.has_magic(stream) or is_seed_file(path))


def folder_of_a_run(out: Path, stream: str) -> Path | None:
    """The folder for a run's own files in which OUT lies; the run may be `--from`, and still to come."""
    real = real_path(out)
    for path in (real, *real.parents):
        run = path.parent
        if path.name in _FOLDERS_OF_A_RUN and (is_run_directory(run) or run == real_path(stream)):
            return path
    return None


def is_read_with(out: Path, pattern: str) -> bool:
    """Whether who reads all that a path or a glob names would come upon files of the training in OUT."""
    wanted, real = real_path(pattern).parts, real_path(out)
    return any(_leads_to((real / name).parts, wanted) for name in _FILES_OF_A_TRAINING)


def _leads_to(file: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Whether a pattern matches a file or a folder that it lies in; from `**` on it may be anything."""
    wanted = tuple(takewhile(lambda part: part != "**", wanted))
    return len(wanted) <= len(file) and all(
        part == given or fnmatchcase(part, given) for part, given in zip(file, wanted, strict=False)
    )


def real_path(path: str | Path) -> Path:
    """Whole and without links, so that two ways to a place are one."""
    return Path(os.path.realpath(path))


def _may_become_one(path: Path, out: Path) -> bool:
    """Whether a directory has nothing but OUT in it, or is that of a run that awaits its servers' answers."""
    if (path / ".lock").is_file() and (path / "contexts").is_dir():
        return True
    real = real_path(out)
    return all(real_path(child) in (real, *real.parents) for child in path.iterdir())
