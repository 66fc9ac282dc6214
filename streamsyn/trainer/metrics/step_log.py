"""A file of JSON lines that each name their step, in order; those after a checkpoint are cut off again.

OUT/task_losses.json: how hard each task is for the model now. A producer may weigh its seeds by it.
"""

import math
import mmap
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from streamsyn.errors import SinkError
from streamsyn.io.durable import write_whole
from streamsyn.trainer.examples import Example


class StepLog:
    """Appends lines to `path`. Lines of steps after `step`, and a torn one, are cut off first.

    Raises:
        SinkError: It cannot be written; so for each of its methods.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        try:
            if path.exists():
                _cut(path, step)
        except OSError as error:
            raise self._failed(error) from error

    def append(self, line: dict[str, Any]) -> None:
        """Write one line; no power cut is waited out."""
        try:
            with self._path.open("ab") as file:
                file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        except OSError as error:
            raise self._failed(error) from error

    def sync(self) -> None:
        """Return when all lines are on disk."""
        try:
            with self._path.open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> SinkError:
        return SinkError(f"cannot write {self._path}: {error.strerror}")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of this kind, but for a torn or a foreign one; none if there is no file.

    Raises:
        OSError: It cannot be read.
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
    """Leave the lines up to `step`. The file is looked at from its end."""
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
        return bool(orjson.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False


HALF_LIFE = 32
"""After so many examples of its task, a loss weighs half."""
_KEPT = 0.5 ** (1 / HALF_LIFE)
_WRITE_EVERY_S = 30.0


class TaskLosses:
    """An exponential mean, for each task, of the losses of its examples in the order of training.

    After n examples, the i-th weighs in proportion to 0.5 ** ((n - i) / HALF_LIFE): the first one is no
    more than one of them.

    Args:
        path: The file.
        state: What `state` gave before.
    """

    def __init__(self, path: Path, state: Mapping[str, Mapping[str, float]]) -> None:
        self._path = path
        self._tasks = {task: dict(found) for task, found in state.items()}
        self._written = time.monotonic()

    def state(self) -> dict[str, dict[str, float]]:
        """For each task its `loss` and how many `examples` it is of."""
        return {task: dict(found) for task, found in self._tasks.items()}

    def add(self, examples: Iterable[Example], losses: Iterable[float]) -> None:
        """Take up the losses of examples; those that are not finite are passed over."""
        for example, loss in zip(examples, losses, strict=True):
            if math.isfinite(loss):
                found = self._tasks.setdefault(example.task, {"loss": 0.0, "examples": 0})
                found["examples"] += 1
                share = (1 - _KEPT) / (1 - _KEPT ** found["examples"])
                found["loss"] += share * (loss - found["loss"])

    def write(self, step: int, *, now: bool = False) -> None:
        """Replace the file, if it is to be `now` or the last time was long ago.

        Raises:
            SinkError: It cannot be written.
        """
        if not now and time.monotonic() - self._written < _WRITE_EVERY_S:
            return
        self._written = time.monotonic()
        found: dict[str, Any] = {"step": step, "tasks": self._tasks}
        write_whole(self._path, orjson.dumps(found, option=orjson.OPT_INDENT_2))
