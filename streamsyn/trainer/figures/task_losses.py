"""OUT/task_losses.json: how hard each task is for the model now. A producer may weigh its seeds by it."""

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from streamsyn.sink.rundir import write_whole
from streamsyn.trainer.stream.examples import Example

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
