"""What the paths of a training lead to, without opening anything.

From `--from` and `train.mix` to sources.
"""

import glob
import os
import sys
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path

import structlog

from streamsyn.config.train_section import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.io.paths import is_row_file, is_run_directory
from streamsyn.sink.shards import KINDS
from streamsyn.trainer.sources.pipe import PipedSamples
from streamsyn.trainer.sources.row_files import FileRows
from streamsyn.trainer.sources.run_samples import RunSamples
from streamsyn.trainer.sources.source import Mixed, Source, Sources, path_errors

log = structlog.get_logger()

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


def is_run(stream: str, out: Path) -> bool:
    """Whether `--from` is a run directory, or the place of one that is still to come."""
    path = Path(stream)
    if is_run_directory(path):
        return True
    if path.is_dir():
        return _may_become_one(path, out)
    return not (path.exists() or glob.has_magic(stream) or is_row_file(path))


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


def open_sources(stream: str, section: TrainSection, out: Path) -> Sources:
    """The sources of a training run.

    Args:
        stream: `-` for NDJSON on stdin; a run directory, which need not be there yet; or a file, a glob, a
            saved data set or a directory of files, which are read as they are.
        section: Names what is mixed in.
        out: Where the training run keeps its files.

    Raises:
        ConfigError: There is nothing to read, or nothing that can be.
    """
    mix = [
        Mixed(FileRows(one.path, f"mix:{one.path}", "train.mix", count=False), one.weight)
        for one in section.mix
    ]
    return Sources(_open_stream(stream, out), mix)


def _open_stream(stream: str, out: Path) -> Source:
    if stream == "-":
        return _open_stdin(out / "spool")
    if "://" in stream:
        raise ConfigError(f"--from {stream}: a stream is followed in a directory or on stdin")
    with path_errors("--from", stream):
        if not is_run(stream, out):
            return _open_files(stream)
        path = Path(stream)
        if not path.exists():
            log.warning("stream.not_there_yet", directory=stream)
        return RunSamples(path)


def _open_files(stream: str) -> Source:
    rows = FileRows(stream, "files", "--from", count=True)
    if not rows.fetch(0, 1):
        raise ConfigError(f"--from {stream} is empty")
    return rows


def _open_stdin(spool: Path) -> Source:
    if sys.stdin is None:  # Python found it closed; by now its number may be another file's
        return PipedSamples(spool, None)
    if os.isatty(0):
        if not (spool / "samples.jsonl").exists():
            raise ConfigError("--from - reads samples from stdin, and that is a terminal")
        return PipedSamples(spool, None)
    return PipedSamples(spool, 0)
