"""Contexts that wait for distractors, and the size of a pool at which each is worth another try."""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from streamsyn.assembly.passages import Passage
from streamsyn.sections import Source

_Queue = tuple[Source, str]


class Waiting:
    """Each waits for one source: its own task, or any."""

    def __init__(self) -> None:
        self._heaps: dict[_Queue, list[tuple[int, int]]] = {}
        self._passages: dict[int, Passage] = {}

    def __len__(self) -> int:
        return sum(map(len, self._heaps.values())) + len(self._heaps) + len(self._passages)

    def add(self, passage: Passage, source: Source, retry_at: int) -> None:
        """Have it wait until the source has had `retry_at` contexts."""
        self._passages[passage.seq] = passage
        heappush(self._heaps.setdefault(_queue(source, passage.task), []), (retry_at, passage.seq))

    def holds(self, passage: Passage) -> bool:
        """Whether it waits."""
        return passage.seq in self._passages

    def remove(self, passage: Passage) -> None:
        """It waits no more, if it did."""
        self._passages.pop(passage.seq, None)

    def clear(self) -> None:
        """None waits any more."""
        self._heaps.clear()
        self._passages.clear()

    def due(self, source: Source, task: str, size: int) -> Iterator[Passage]:
        """Those that are worth a try now that the source has had `size` contexts; they wait no more."""
        heap = self._heaps.get(_queue(source, task), [])
        while heap and heap[0][0] <= size:
            _, seq = heappop(heap)
            if (passage := self._passages.pop(seq, None)) is not None:
                yield passage
        if not heap:
            self._heaps.pop(_queue(source, task), None)

    def tidy(self, source: Source, task: str, pool: int) -> None:
        """Keep no more than twice the pool's size, whatever has left the window."""
        heap = self._heaps.get(_queue(source, task), [])
        if len(heap) > 2 * pool:
            heap[:] = [entry for entry in heap if entry[1] in self._passages]
            heapify(heap)
        if not heap:
            self._heaps.pop(_queue(source, task), None)

    def all(self) -> list[Passage]:
        """All that wait, in the order of the log."""
        return [self._passages[seq] for seq in sorted(self._passages)]

    def entries(self, source: Source) -> list[tuple[int, int]]:
        """(seq, size at which to try again) of those that wait for a source, in order."""
        return sorted(
            (seq, retry_at)
            for (of, _), heap in self._heaps.items()
            for retry_at, seq in heap
            if of == source and seq in self._passages
        )


def _queue(source: Source, task: str) -> _Queue:
    return source, "" if source == "any_task" else task
