"""The order in which work is handed out: that of reading, but for groups, which stay together."""

from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

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
