"""The window of recent contexts that distractors are drawn from, and the contexts that wait for distractors.

`Window` holds the most recent passages, bounded in bytes, with a `Pool` for each task and one for all.
`Waiting` holds the passages that have no sample yet, ordered by the pool size at which each is worth
another try.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush
from random import Random
from typing import Any, TypeVar

from streamsyn.config.sections import Source
from streamsyn.records import Context
from streamsyn.shingles import Signature, signature, signatures
from streamsyn.words import normalised

T = TypeVar("T")

_RECORD_BYTES = 1024
"""Approximate memory of a passage besides its texts, in bytes."""


class Piece(ABC):
    """A text that can be part of a sample, with values that are computed from it once."""

    text: str
    tokens: int
    """As counted by the server that wrote the text, or an estimate."""

    @property
    @abstractmethod
    def log_seq(self) -> int | None:
        """The context's seq in the log; None for a text from a corpus."""

    @property
    @abstractmethod
    def source_seed_id(self) -> str | None:
        """The id of the seed the text was written for; None for a text from a corpus.

        Texts of one seed tell the same story, so a sample holds at most one of them.
        """

    @cached_property
    def plain(self) -> str:
        """The text for comparisons: case-folded, with white space collapsed."""
        return normalised(self.text)

    @cached_property
    def signature(self) -> Signature:
        """The MinHash signature that near-duplicates are found by."""
        return signature(self.text)


def sign(pieces: Sequence[Piece]) -> None:
    """Compute the signatures of passages that have none: together it takes less time than one by one."""
    new = [piece for piece in pieces if "signature" not in vars(piece)]
    give_signatures(new, signatures([piece.text for piece in new]))


def give_signatures(pieces: Sequence[Piece], signed: Sequence[Signature]) -> None:
    """Give passages the signatures of their texts."""
    for piece, one in zip(pieces, signed, strict=True):
        vars(piece)["signature"] = one


@dataclass(frozen=True, eq=False)
class Passage(Piece):
    """A context of the log, with the fields that assembly needs."""

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
        """Make a passage from a context that has just been logged."""
        return cls(
            seq,
            context.id,
            context.seed_id,
            context.task,
            context.instruction,
            context.answer,
            context.context,
            *_from_checks(context.completion_tokens - context.thinking_tokens, context.checks),
        )

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> "Passage":
        """Make a passage from a row of the log."""
        return cls(
            row["seq"],
            row["id"],
            row["seed_id"],
            row["task"],
            row["instruction"],
            row["answer"],
            row["context"],
            *_from_checks(row["completion_tokens"] - row.get("thinking_tokens", 0), row.get("checks") or {}),
        )

    @property
    def log_seq(self) -> int:
        return self.seq

    @property
    def source_seed_id(self) -> str:
        return self.seed_id

    @cached_property
    def size(self) -> int:
        """Bytes that count in `assembly.window_bytes`: the text twice (`plain` is a copy) and the rest."""
        return 2 * len(self.text.encode()) + len(self.instruction) + len(self.answer) + _RECORD_BYTES


def _from_checks(text_tokens: int, checks: dict[str, Any]) -> tuple[int, tuple[str, ...], float | None]:
    """Return tokens, flags and context gain. Multi-step recipes record the tokens of the text itself."""
    return checks.get("tokens", text_tokens), tuple(checks.get("flags", ())), checks.get("context_gain")


class Window:
    """The most recent passages of all tasks, bounded by their size in bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._passages: deque[Passage] = deque()
        self.pools: dict[str, Pool] = {}
        """The passages of each task."""
        self.everything = Pool()
        """The passages of all tasks."""

    def __iter__(self) -> Iterator[Passage]:
        """The passages, oldest first."""
        return iter(self._passages)

    @property
    def first_seq(self) -> int | None:
        """The seq of the oldest passage; None when the window is empty."""
        return self._passages[0].seq if self._passages else None

    def add(self, passage: Passage) -> None:
        """Add the newest passage."""
        self._passages.append(passage)
        self._bytes += passage.size
        self.everything.add(passage)
        self.pools.setdefault(passage.task, Pool()).add(passage)

    def overflow(self) -> Passage | None:
        """Return the oldest passage if the window is too large; the newest passage always stays."""
        if self._bytes > self._max_bytes and len(self._passages) > 1:
            return self._passages[0]
        return None

    def drop_oldest(self) -> None:
        """Remove the oldest passage."""
        passage = self._passages.popleft()
        self._bytes -= passage.size
        self.everything.drop_oldest()
        pool = self.pools[passage.task]
        pool.drop_oldest()
        if not pool:
            del self.pools[passage.task]


class Pool:
    """Passages of the window, of one task or of all tasks, oldest first."""

    def __init__(self) -> None:
        self._passages: list[Passage] = []
        self._head = 0
        self.added = 0
        """Passages ever added, including those that have left the window."""

    def __len__(self) -> int:
        return len(self._passages) - self._head

    def add(self, passage: Passage) -> None:
        """Add the newest passage."""
        self._passages.append(passage)
        self.added += 1

    def drop_oldest(self) -> None:
        """Remove the oldest passage."""
        self._head += 1
        if self._head > 64 and 8 * self._head > len(self._passages):  # free the texts of removed passages
            del self._passages[: self._head]
            self._head = 0

    def shuffled(self, rng: Random) -> Iterator[Passage]:
        """Yield the passages in random order, each drawn when it is requested."""
        return shuffled(self._passages, rng, self._head)


def shuffled(items: Sequence[T], rng: Random, first: int = 0) -> Iterator[T]:
    """Yield the items from index `first` on in random order, each drawn when it is requested."""
    # A Fisher-Yates shuffle that stores only the positions that have been swapped.
    swapped: dict[int, int] = {}
    for last in range(len(items) - first - 1, -1, -1):
        bits = (last + 1).bit_length()
        while (index := rng.getrandbits(bits)) > last:  # as rng.randrange, in half of the time
            pass
        yield items[first + swapped.get(index, index)]
        swapped[index] = swapped.get(last, last)


_Queue = tuple[Source, str]


class Waiting:
    """Passages that wait for more distractors, each in the queue of one source: its own task, or any task."""

    def __init__(self) -> None:
        self._heaps: dict[_Queue, list[tuple[int, int]]] = {}
        self._passages: dict[int, Passage] = {}

    def __len__(self) -> int:
        """Objects held, for memory bounds: heap entries, heaps and passages."""
        return sum(map(len, self._heaps.values())) + len(self._heaps) + len(self._passages)

    def __contains__(self, passage: Passage) -> bool:
        return passage.seq in self._passages

    def add(self, passage: Passage, source: Source, retry_at: int) -> None:
        """Make a passage wait until `retry_at` contexts have been added to the source's pool."""
        self._passages[passage.seq] = passage
        heappush(self._heaps.setdefault(_queue(source, passage.task), []), (retry_at, passage.seq))

    def discard(self, passage: Passage) -> None:
        """Remove a passage, if it waits."""
        self._passages.pop(passage.seq, None)

    def clear(self) -> None:
        """Remove all passages."""
        self._heaps.clear()
        self._passages.clear()

    def pop_due(self, source: Source, task: str, added: int) -> Iterator[Passage]:
        """Remove and yield the passages to try again, now that the source's pool has had `added` contexts."""
        heap = self._heaps.get(_queue(source, task), [])
        while heap and heap[0][0] <= added:
            _, seq = heappop(heap)
            if (passage := self._passages.pop(seq, None)) is not None:
                yield passage
        if not heap:
            self._heaps.pop(_queue(source, task), None)

    def compact(self, source: Source, task: str, pool_size: int) -> None:
        """Delete the entries of passages that have left, so that a heap stays below twice its pool's size."""
        heap = self._heaps.get(_queue(source, task), [])
        if len(heap) > 2 * pool_size:
            heap[:] = [entry for entry in heap if entry[1] in self._passages]
            heapify(heap)
        if not heap:
            self._heaps.pop(_queue(source, task), None)

    def all(self) -> list[Passage]:
        """Return all waiting passages in the order of the log."""
        return [self._passages[seq] for seq in sorted(self._passages)]

    def entries(self, source: Source) -> list[tuple[int, int]]:
        """Return (seq, retry_at) of the passages that wait for a source, sorted."""
        return sorted(
            (seq, retry_at)
            for (of, _), heap in self._heaps.items()
            for retry_at, seq in heap
            if of == source and seq in self._passages
        )


def _queue(source: Source, task: str) -> _Queue:
    return source, "" if source == "any_task" else task
