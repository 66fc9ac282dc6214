"""A file of JSON lines in the order of their steps. Lines after the last checkpoint are cut off on resume."""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from streamsyn.errors import SinkError

AT_STEP = "at_step"
"""The field of a line about an earlier `step`: the step of the training when it was written."""


class StepLog:
    """Appends lines to a file.

    Args:
        path: The file, which need not exist.
        step: Later steps' lines are cut off first, as is a torn last line.

    Raises:
        SinkError: The file cannot be written. Each method raises it too.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        try:
            if path.exists():
                _cut(path, step)
        except OSError as error:
            raise self._failed(error) from error

    def append(self, line: dict[str, Any]) -> None:
        """Write one line, without fsync."""
        try:
            with self._path.open("ab") as file:
                file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        except OSError as error:
            raise self._failed(error) from error

    def sync(self) -> None:
        """Flush all lines to disk (fsync)."""
        try:
            with self._path.open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> SinkError:
        return SinkError(f"cannot write {self._path}: {error.strerror}")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of such a file. Lines that are not JSON objects are skipped; a missing file has no lines.

    Raises:
        OSError: The file cannot be read.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                read = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            if isinstance(read, dict):
                yield read


def _cut(path: Path, step: int) -> None:
    """Cut off the lines after `step`, searching from the end of the file."""
    with path.open("r+b") as file:
        end = os.fstat(file.fileno()).st_size
        if end:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
                end = lines.rfind(b"\n") + 1
                while end:
                    begin = lines.rfind(b"\n", 0, end - 1) + 1
                    if _is_kept(lines[begin:end], step):
                        break
                    end = begin
        file.truncate(end)
        os.fsync(file.fileno())


def _is_kept(line: bytes, step: int) -> bool:
    try:
        found = orjson.loads(line)
        return bool(found.get(AT_STEP, found["step"]) <= step)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
