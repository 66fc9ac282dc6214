"""The order in which the producer hands out the drafts that it has read ahead.

`GroupOrder` is the order of reading, except that prefix groups are kept together, so that their shared prefix
stays in a server's cache. `TaskOrder` puts hard tasks first: a trainer keeps the mean loss of each task in
OUT/task_losses.json (`TaskLosses`), and drafts are drawn by task in proportion to these losses.

Both only change the order: every seed that is read still gets its outcome, and `seeds.limit` counts seeds
that are read. A run that is stopped, or a stream without end, has done more of the hard tasks, as far as
`seeds.task_window` looks ahead.
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

FLOOR = 0.1
"""The least weight of a task, as a share of the heaviest task's."""
PATIENCE = 4
"""No item waits while more than this number of windows of other items are handed out."""


class GroupOrder(Generic[T]):
    """Hands out items so that those of one group follow each other; without groups it is a plain queue.

    The oldest item is next, unless one of the same group as the last is within the window. So every item is
    handed out fewer than `window` places before or after its place in the order of reading.

    Args:
        window: How far an item may be moved, in items; below 2 it is a plain queue.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._items: dict[int, tuple[str, T]] = {}  # by number, in the order of reading
        self._by_group: dict[str, deque[int]] = {}
        self._last_group = ""
        self._added = 0
        self._has_groups = False

    def __len__(self) -> int:
        return len(self._items)

    @property
    def has_room(self) -> bool:
        """Whether to read ahead before the next item is handed out: only where there are groups."""
        return not self._items or (self._has_groups and len(self._items) < self._window)

    def add(self, items: Iterable[tuple[str, T]]) -> None:
        """Add the items that were read next, each with its group; "" is no group."""
        for group, item in items:
            self._items[self._added] = (group, item)
            if group:
                self._has_groups = True
                self._by_group.setdefault(group, deque()).append(self._added)
            self._added += 1

    def take(self) -> T:
        """Remove and return the next item.

        Raises:
            LookupError: There is none.
        """
        oldest = next(iter(self._items), None)
        if oldest is None:
            raise LookupError("no item to hand out")
        number = oldest
        # Only near the oldest, so that fewer than `window` items are ever handed out before that one.
        if (same := self._by_group.get(self._last_group)) and same[0] - oldest < self._window:
            number = same[0]
        group, item = self._items.pop(number)
        if group:
            numbers = self._by_group[group]
            numbers.popleft()  # it is always the first: a group keeps its order
            if not numbers:
                del self._by_group[group]
        self._last_group = group
        return item


class TaskOrder(Generic[T]):
    """Hands out items of hard tasks first; has the same methods as `GroupOrder`.

    A task is drawn by its weight, and its oldest item is next; the rest of that item's group follows, so that
    groups stay together. While no loss is known, the oldest item is next. The same items and losses give the
    same order.

    Args:
        task_of: Returns the task of an item.
        losses: The losses, read again for each draw.
        window: Number of items to hold, out of which the next is drawn.
        exponent: 0 gives all tasks the same weight, 1 weighs them in proportion to their losses.
        seed: Seed of the draws.
    """

    def __init__(
        self, task_of: Callable[[T], str], losses: "TaskLosses", window: int, exponent: float, seed: int
    ) -> None:
        self._task_of = task_of
        self._losses = losses
        self._window = window
        self._exponent = exponent
        self._rng = Random(f"tasks {seed}")
        self._items: dict[int, tuple[str, T, int]] = {}  # by number, in the order of reading
        self._by_task: dict[str, deque[int]] = {}
        self._by_group: dict[str, deque[int]] = {}
        self._last_group = ""
        self._added = self._taken = 0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def has_room(self) -> bool:
        """Whether to read ahead before the next item is handed out."""
        return len(self._items) < self._window

    def add(self, items: Iterable[tuple[str, T]]) -> None:
        """Add the items that were read next, each with its group; "" is no group."""
        for group, item in items:
            self._items[self._added] = (group, item, self._taken)
            self._by_task.setdefault(self._task_of(item), deque()).append(self._added)
            if group:
                self._by_group.setdefault(group, deque()).append(self._added)
            self._added += 1

    def take(self) -> T:
        """Remove and return the next item.

        Raises:
            LookupError: There is none.
        """
        oldest = next(iter(self._items), None)
        if oldest is None:
            raise LookupError("no item to hand out")
        number = self._next(oldest)
        self._last_group, item, _ = self._items.pop(number)
        self._taken += 1
        return item

    def _next(self, oldest: int) -> int:
        if self._taken - self._items[oldest][2] >= PATIENCE * self._window:
            return oldest
        same = self._first(self._by_group, self._last_group)
        if same is not None:
            return same
        losses = self._losses.losses
        if not losses:
            return oldest
        firsts = {task: self._first(self._by_task, task) for task in list(self._by_task)}
        tasks = [task for task, first in firsts.items() if first is not None]
        weights = task_weights(tasks, losses, self._exponent)
        (task,) = self._rng.choices(list(weights), list(weights.values()))
        first = firsts[task]
        assert first is not None
        return first

    def _first(self, lines: dict[str, deque[int]], name: str) -> int | None:
        """The oldest number in the line `name` that was not handed out yet; an empty line is dropped."""
        line = lines.get(name)
        while line and line[0] not in self._items:
            line.popleft()
        if not line:
            lines.pop(name, None)
            return None
        return line[0]


class TaskLosses:
    """The loss of each task, from a file that a trainer replaces now and then and that need not exist yet.

    Args:
        path: The file: `{"tasks": {task: {"loss": nats, ...}, ...}, ...}`.

    Attributes:
        losses: Mean loss in nats, by task, as read last.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version: tuple[int, int, int] | None = None
        self._is_unreadable = False
        self.losses: Mapping[str, float] = {}

    def refresh(self) -> None:
        """Read the file again if it has changed; a damaged file is logged and changes nothing. Blocks."""
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                version = (found.st_mtime_ns, found.st_ino, found.st_size)
                if version == self._version:
                    return
                self._version = version
                data = file.read()
            self.losses = _losses(orjson.loads(data))
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            if not (
                self._is_unreadable and isinstance(error, OSError)
            ):  # a damaged file is logged once per version
                log.warning("seeds.task_losses_unreadable", path=str(self._path), why=why)
            self._is_unreadable = isinstance(error, OSError)
        else:
            self._is_unreadable = False
            shown = {task: round(loss, 3) for task, loss in self.losses.items()}
            log.info("seeds.task_losses", path=str(self._path), losses=shown)


def task_weights(tasks: Iterable[str], losses: Mapping[str, float], exponent: float) -> dict[str, float]:
    """The weight of each task: its loss (the mean loss if unknown) to the power of `exponent`.

    Scaled so that the heaviest task has 1; no task has less than FLOOR.
    """
    mean = sum(losses.values()) / len(losses)
    raw = {task: losses.get(task, mean) for task in tasks}
    heaviest = max(raw.values())
    return {
        task: max(FLOOR, (loss / heaviest) ** exponent) if heaviest else 1.0 for task, loss in raw.items()
    }


def _losses(found: Any) -> dict[str, float]:
    losses = {
        task: float(entry["loss"]) for task, entry in found["tasks"].items() if entry["loss"] is not None
    }
    if any(not math.isfinite(loss) or loss < 0 for loss in losses.values()):
        raise ValueError("a loss is negative or not finite")
    return losses
