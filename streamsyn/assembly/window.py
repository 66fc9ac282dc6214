"""What assembly holds of a context, and the window of recent ones that distractors are drawn from.

Contexts that wait for distractors, and the size of a pool at which each is worth another try.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush
from random import Random
from typing import Any

from streamsyn.config.sections import Source
from streamsyn.records import Context
from streamsyn.shingles import Signature, signature

_RECORD_BYTES = 1024
"""What a passage costs besides its texts, roughly."""


class Piece(ABC):
    """A text that may stand in a sample, and what is worked out of it once."""

    text: str
    tokens: int
    """As the server that wrote it counted, or an estimate."""

    @property
    @abstractmethod
    def log_seq(self) -> int | None:
        """Its place in the log; None when it is no context."""

    @property
    @abstractmethod
    def origin(self) -> str | None:
        """The seed it was written for: texts of one origin tell the same story. None when there is none."""

    @cached_property
    def plain(self) -> str:
        """The text for comparing: case and white space do not count."""
        return " ".join(self.text.casefold().split())

    @cached_property
    def signature(self) -> Signature:
        """By which near-duplicates of it are found."""
        return signature(self.text)

    def holds(self, answer: str) -> bool:
        """Whether it contains `answer`, which is given as `plain` would have it."""
        return answer in self.plain


@dataclass(frozen=True, eq=False)
class Passage(Piece):
    """A context as assembly sees it."""

    seq: int
    id: str
    seed_id: str
    task: str
    instruction: str
    answer: str
    text: str
    tokens: int
    flags: tuple[str, ...] = ()
    context_gain: float | None = None

    @classmethod
    def of_context(cls, seq: int, context: Context) -> "Passage":
        """From a context that has just been logged."""
        return cls(
            seq,
            context.id,
            context.seed_id,
            context.task,
            context.instruction,
            context.answer,
            context.context,
            *_figures(context.completion_tokens, context.checks),
        )

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> "Passage":
        """From a row of the log."""
        return cls(
            row["seq"],
            row["id"],
            row["seed_id"],
            row["task"],
            row["instruction"],
            row["answer"],
            row["context"],
            *_figures(row["completion_tokens"], row.get("checks") or {}),
        )

    @property
    def log_seq(self) -> int:
        return self.seq

    @property
    def origin(self) -> str:
        return self.seed_id

    @cached_property
    def size(self) -> int:
        """Bytes it counts for in the window: its text twice (once for comparing) and the rest."""
        return 2 * len(self.text.encode()) + len(self.instruction) + len(self.answer) + _RECORD_BYTES


def _figures(completion_tokens: int, checks: dict[str, Any]) -> tuple[int, tuple[str, ...], float | None]:
    """Tokens, flags and gain. A recipe that asks in steps says how many tokens its text alone has."""
    return checks.get("tokens", completion_tokens), tuple(checks.get("flags", ())), checks.get("context_gain")


class Pool:
    """Passages in the window, of one task or of all, oldest first."""

    def __init__(self) -> None:
        self._passages: list[Passage] = []
        self._head = 0
        self.added = 0
        """How many have come, including those that have left again."""

    def __len__(self) -> int:
        return len(self._passages) - self._head

    def add(self, passage: Passage) -> None:
        """Take in the newest."""
        self._passages.append(passage)
        self.added += 1

    def drop_oldest(self) -> None:
        """Let the oldest go."""
        self._head += 1
        if self._head > 64 and 8 * self._head > len(self._passages):  # what is dropped must not live on here
            del self._passages[: self._head]
            self._head = 0

    def shuffled(self, rng: Random) -> Iterator[Passage]:
        """The passages in random order, drawn one by one as they are asked for."""
        first = self._head
        return (self._passages[first + place] for place in shuffled(len(self), rng))


def shuffled(length: int, rng: Random) -> Iterator[int]:
    """The numbers below `length` in random order, drawn one by one as they are asked for."""
    # Fisher and Yates, keeping only the places that have been swapped.
    swapped: dict[int, int] = {}
    for last in range(length - 1, -1, -1):
        place = rng.randrange(last + 1)
        yield swapped.get(place, place)
        swapped[place] = swapped.get(last, last)


class Window:
    """The most recent passages of all tasks, bounded by their size in bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._passages: deque[Passage] = deque()
        self.pools: dict[str, Pool] = {}
        """Those of each task."""
        self.everything = Pool()
        """Those of all tasks."""

    @property
    def first_seq(self) -> int | None:
        """The seq of the oldest passage; None when there is none."""
        return self._passages[0].seq if self._passages else None

    def add(self, passage: Passage) -> None:
        """Take in the newest passage."""
        self._passages.append(passage)
        self._bytes += passage.size
        self.everything.add(passage)
        self.pools.setdefault(passage.task, Pool()).add(passage)

    def overflow(self) -> Passage | None:
        """The oldest passage, when there is too much; the newest never is."""
        if self._bytes > self._max_bytes and len(self._passages) > 1:
            return self._passages[0]
        return None

    def drop_oldest(self) -> None:
        """Let the oldest passage go."""
        passage = self._passages.popleft()
        self._bytes -= passage.size
        self.everything.drop_oldest()
        pool = self.pools[passage.task]
        pool.drop_oldest()
        if not pool:
            del self.pools[passage.task]


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
