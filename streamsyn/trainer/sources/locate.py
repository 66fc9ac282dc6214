"""From the paths of a training, `--from` and `train.mix`, to its sources.

Also which paths collide: files that the training writes to OUT must never be read as rows.
"""

import glob
import os
import sys
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import Any

import structlog

from streamsyn.config.command_sections import TrainSection
from streamsyn.config.data_paths import hub_name, is_url
from streamsyn.errors import ConfigError
from streamsyn.following.daemon_client import is_run_url
from streamsyn.io.inputs import is_row_file, is_run_directory
from streamsyn.sink.partitions import begun_directories
from streamsyn.sink.rundir import read_run_json
from streamsyn.sink.shards import KINDS
from streamsyn.trainer.sources.pipe import PipedSamples
from streamsyn.trainer.sources.row_files import FileRows
from streamsyn.trainer.sources.run_samples import DaemonSamples, RunSamples
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
"""One file for each depth and kind that could be read as rows."""


def open_sources(stream: str, section: TrainSection, out: Path) -> Sources:
    """Open the sources of a training.

    Args:
        stream: `--from`: `-` for NDJSON on stdin; a run directory, which need not exist yet; the URL of a run
            at a daemon; or a file, glob, saved dataset or directory of files, a URL of these, or
            `org/name:split` on the hub: they do not change. `org/name` alone is a run directory that may
            still come.
        section: The section `train`; `train.mix` names what is mixed in.
        out: OUT; what is read from stdin is kept in OUT/spool.

    Raises:
        ConfigError: There is nothing to read, or it cannot be read.
    """
    mix = [
        Mixed(FileRows(one.path, f"mix:{one.path}", "train.mix", count=False), one.weight)
        for one in section.mix
    ]
    source = _open_stream(stream, out)
    if isinstance(source, RunSamples):
        _warn_of_leaks(Path(stream), section.holdout)
    return Sources(source, mix)


def _warn_of_leaks(run: Path, holdout: float) -> None:
    """Warn if samples of a run have contexts of held-out seeds as distractors."""
    saved = read_run_json(begun_directories(run)[0])
    assembly: dict[str, Any] = saved["config"].get("assembly", {}) if saved is not None else {}
    if assembly.get("holdout", 0.0) < holdout and assembly.get("distractors") not in ("none", "corpus"):
        log.warning(
            "stream.holdout",
            why=f"samples of {run} have contexts of held-out seeds as distractors: for new samples, run or "
            f"export with assembly.holdout = {holdout}",
        )


def _open_stream(stream: str, out: Path) -> Source:
    if stream == "-":
        return _open_stdin(out / "spool")
    if is_run_url(stream):
        return DaemonSamples(stream)
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
    if sys.stdin is None:  # closed before Python started; its number may belong to a different file by now
        return PipedSamples(spool, None)
    if os.isatty(0):
        if not (spool / "samples.jsonl").exists():
            raise ConfigError("--from - reads samples from stdin, but stdin is a terminal")
        return PipedSamples(spool, None)
    return PipedSamples(spool, 0)


def is_run(stream: str, out: Path) -> bool:
    """Whether `--from` is a run directory, or a place where a run may still start."""
    path = Path(stream)
    if is_url(stream) or ((hub := hub_name(stream)) is not None and hub.split is not None):
        return False
    if is_run_directory(path):
        return True
    if path.is_dir():
        return _may_become_run(path, out)
    return not (path.exists() or glob.has_magic(stream) or is_row_file(path))


def folder_of_a_run(out: Path, stream: str) -> Path | None:
    """The folder of a run's own files that contains OUT, if any; the run may be `--from`, and not started
    yet.
    """
    real = real_path(out)
    for path in (real, *real.parents):
        run = path.parent
        if path.name in _FOLDERS_OF_A_RUN and (is_run_directory(run) or run == real_path(stream)):
            return path
    return None


def is_read_with(out: Path, pattern: str) -> bool:
    """Whether reading all files of a path or glob would read files that the training writes to OUT."""
    wanted, real = real_path(pattern).parts, real_path(out)
    return any(_matches((real / name).parts, wanted) for name in _FILES_OF_A_TRAINING)


def _matches(file: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Whether a pattern matches a file or one of its folders; everything from `**` on is taken to match."""
    wanted = tuple(takewhile(lambda part: part != "**", wanted))
    return len(wanted) <= len(file) and all(
        part == given or fnmatchcase(part, given) for part, given in zip(file, wanted, strict=False)
    )


def real_path(path: str | Path) -> Path:
    """The absolute path without links, to compare paths."""
    return Path(os.path.realpath(path))


def _may_become_run(path: Path, out: Path) -> bool:
    """Whether a directory holds nothing but OUT, or belongs to a run whose servers have not answered yet."""
    if (path / ".lock").is_file() and (path / "contexts").is_dir():
        return True
    real = real_path(out)
    return all(real_path(child) in (real, *real.parents) for child in path.iterdir())
