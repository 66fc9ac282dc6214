"""Samples drawn evenly from a stream of unknown length: those whose keys are smallest."""

from bisect import insort
from collections.abc import Callable
from typing import Generic, TypeVar

from streamsyn.records import digest

T = TypeVar("T")


class Smallest(Generic[T]):
    """Keeps the few items with the smallest keys; an item is made only when it is to be kept.

    With `drawn` as the key that is an even draw without replacement, the same whatever the order.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._kept: list[tuple[tuple[float, bytes], T]] = []

    def offer(self, key: tuple[float, bytes], make: Callable[[], T]) -> None:
        """Keep what `make` makes, if its key is among the smallest."""
        if len(self._kept) == self._number and key >= self._kept[-1][0]:
            return
        insort(self._kept, (key, make()), key=lambda kept: kept[0])
        del self._kept[self._number :]

    @property
    def items(self) -> list[T]:
        """What is kept, smallest key first."""
        return [item for _, item in self._kept]


def drawn(what: str, name: str, rank: float = 0.0) -> tuple[float, bytes]:
    """A key that falls evenly: what is drawn for depends on names alone. A `rank` goes first."""
    return rank, digest("report", what, name)
