"""From `--from` and `train.mix` to sources."""

import os
import sys
from pathlib import Path

import structlog

from streamsyn.errors import ConfigError
from streamsyn.sections.train import TrainSection
from streamsyn.trainer.sources.files import FileRows
from streamsyn.trainer.sources.pipe import PipedSamples
from streamsyn.trainer.sources.places import is_run, path_errors
from streamsyn.trainer.sources.rundir import RunSamples
from streamsyn.trainer.sources.source import Mixed, Source, Sources

log = structlog.get_logger()


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
