"""The order in which work is handed out: that of reading, but for groups, which stay together.

Hard tasks first: which of the seeds that have been read is worked on next, by the losses of a trainer.

A trainer keeps the mean loss of each task in OUT/task_losses.json. What has been read ahead is given out by
task, in proportion to these losses. Each seed that is read still gets its outcome: over a source that is read
to its end only the order changes, and `seeds.limit` counts what is read; a run that is stopped, or a stream
that goes on for ever, has more of the hard tasks, as far as `seeds.task_window` looks ahead.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any, Generic, TypeVar

import orjson
import structlog

log = structlog.get_logger()


T = TypeVar("T")


class Regroup(Generic[T]):
    """Holds what has been read and gives it out so that items of one group follow each other.

    What was read first is given first, unless something of the group given last is near enough. So every
    item comes fewer than `window` places earlier or later than it was read. It holds only what it was given:
    there is nothing to wait for, and without groups it is a plain queue.

    Args:
        window: How far an item may be moved; below 2 it is a plain queue.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._held: dict[int, tuple[str, T]] = {}  # by number, in the order of reading
        self._of_group: dict[str, deque[int]] = {}
        self._last_group = ""
        self._added = 0
        self._has_groups = False

    def __len__(self) -> int:
        return len(self._held)

    @property
    def has_room(self) -> bool:
        """Whether it is worth reading on before what is held has been given out: where there are groups."""
        return not self._held or (self._has_groups and len(self._held) < self._window)

    def add(self, items: Iterable[tuple[str, T]]) -> None:
        """Add what was read next, each with its group; "" is none."""
        for group, item in items:
            self._held[self._added] = (group, item)
            if group:
                self._has_groups = True
                self._of_group.setdefault(group, deque()).append(self._added)
            self._added += 1

    def take(self) -> T:
        """What is next.

        Raises:
            LookupError: Nothing is held.
        """
        oldest = next(iter(self._held), None)
        if oldest is None:
            raise LookupError("nothing is held")
        number = oldest
        # Near the oldest, so that no more than a window's worth ever goes before that one.
        if (same := self._of_group.get(self._last_group)) and same[0] - oldest < self._window:
            number = same[0]
        group, item = self._held.pop(number)
        if group:
            numbers = self._of_group[group]
            numbers.popleft()  # it is the first of its group: a group keeps its order
            if not numbers:
                del self._of_group[group]
        self._last_group = group
        return item


FLOOR = 0.1
"""No task weighs less than this share of the heaviest."""
PATIENCE = 4
"""No seed waits while more than so many windows of others are given out."""


class TaskLosses:
    """A file of losses that a trainer replaces now and then; it need not be there yet.

    Args:
        path: The file: `{"tasks": {task: {"loss": nats, ...}, ...}, ...}`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._is_unreadable = False
        self.losses: Mapping[str, float] = {}
        """What it said last."""

    def look(self) -> None:
        """Read it again if it is another one; a damaged one changes nothing. Blocks."""
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                version = (found.st_mtime_ns, found.st_ino, found.st_size)
                if version == self._seen:
                    return
                self._seen = version
                data = file.read()
            self.losses = _losses(orjson.loads(data))
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            if not (self._is_unreadable and isinstance(error, OSError)):  # a file is damaged once a version
                log.warning("seeds.task_losses_unreadable", path=str(self._path), why=why)
            self._is_unreadable = isinstance(error, OSError)
        else:
            self._is_unreadable = False
            shown = {task: round(loss, 3) for task, loss in self.losses.items()}
            log.info("seeds.task_losses", path=str(self._path), losses=shown)


def _losses(found: Any) -> dict[str, float]:
    losses = {task: float(told["loss"]) for task, told in found["tasks"].items() if told["loss"] is not None}
    if any(not math.isfinite(loss) or loss < 0 for loss in losses.values()):
        raise ValueError("a loss that is none")
    return losses


def shares(tasks: Iterable[str], losses: Mapping[str, float], exponent: float) -> dict[str, float]:
    """How much each of the tasks weighs: its loss to the power of `exponent`, the mean where there is none;
    the heaviest weighs 1, and none less than FLOOR.
    """
    mean = sum(losses.values()) / len(losses)
    raw = {task: losses.get(task, mean) for task in tasks}
    heaviest = max(raw.values())
    return {
        task: max(FLOOR, (loss / heaviest) ** exponent) if heaviest else 1.0 for task, loss in raw.items()
    }


class ByTask(Generic[T]):
    """Holds what has been read and gives it out by task; see `Regroup`, which it stands in for.

    A task is drawn, and its oldest item goes; then the others of that item's group, so that groups stay
    together. While no loss is known, the oldest item goes. The same items and losses give the same order.

    Args:
        task_of: The task of an item.
        losses: Looked at for each draw.
        window: So many items are held, out of which the next is drawn.
        exponent: 0 gives all tasks the same share, 1 one in proportion to their losses.
        seed: Seeds the draws.
    """

    def __init__(
        self, task_of: Callable[[T], str], losses: TaskLosses, window: int, exponent: float, seed: int
    ) -> None:
        self._task_of = task_of
        self._losses = losses
        self._window = window
        self._exponent = exponent
        self._rng = Random(f"tasks {seed}")
        self._held: dict[int, tuple[str, T, int]] = {}  # by number, in the order of reading
        self._of_task: dict[str, deque[int]] = {}
        self._of_group: dict[str, deque[int]] = {}
        self._last_group = ""
        self._added = self._taken = 0

    def __len__(self) -> int:
        return len(self._held)

    @property
    def has_room(self) -> bool:
        """Whether it is worth reading on before what is held has been given out."""
        return len(self._held) < self._window

    def add(self, items: Iterable[tuple[str, T]]) -> None:
        """Add what was read next, each with its group; "" is none."""
        for group, item in items:
            self._held[self._added] = (group, item, self._taken)
            self._of_task.setdefault(self._task_of(item), deque()).append(self._added)
            if group:
                self._of_group.setdefault(group, deque()).append(self._added)
            self._added += 1

    def take(self) -> T:
        """What is next.

        Raises:
            LookupError: Nothing is held.
        """
        oldest = next(iter(self._held), None)
        if oldest is None:
            raise LookupError("nothing is held")
        number = self._next(oldest)
        self._last_group, item, _ = self._held.pop(number)
        self._taken += 1
        return item

    def _next(self, oldest: int) -> int:
        if self._taken - self._held[oldest][2] >= PATIENCE * self._window:
            return oldest
        same = self._first(self._of_group, self._last_group)
        if same is not None:
            return same
        losses = self._losses.losses
        if not losses:
            return oldest
        firsts = {task: self._first(self._of_task, task) for task in list(self._of_task)}
        tasks = [task for task, first in firsts.items() if first is not None]
        weights = shares(tasks, losses, self._exponent)
        (task,) = self._rng.choices(list(weights), list(weights.values()))
        first = firsts[task]
        assert first is not None
        return first

    def _first(self, lines: dict[str, deque[int]], name: str) -> int | None:
        """The oldest of a line that is still held; one that has none is forgotten."""
        line = lines.get(name)
        while line and line[0] not in self._held:
            line.popleft()
        if not line:
            lines.pop(name, None)
            return None
        return line[0]
