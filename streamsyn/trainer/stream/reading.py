"""How far one source has been read, and what was read ahead of that."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from streamsyn.errors import ConfigError
from streamsyn.records import digest
from streamsyn.trainer.sources.source import Source
from streamsyn.trainer.stream.examples import Dropped, Example, Key, Row
from streamsyn.trainer.stream.holdout import HeldOut

BATCH_ROWS = 32
"""Rows read and rendered at once."""


@dataclass(frozen=True, slots=True)
class Item:
    """What became of a row."""

    key: Key
    made: Example | Dropped | HeldOut
    mark: str
    """Stands for what is in the row."""


def mark_of(row: Row) -> str:
    """Stands for what is in a row."""
    return digest(orjson.dumps(row.value, default=str, option=orjson.OPT_SORT_KEYS)).hex()


class Reading:
    """A source, pass after pass. What is read ahead is no part of its state: it is read again after a kill.

    Args:
        source: What is read.
        epochs: Passes over it; None for a source that is read in a cycle without an end.
        load: Makes of rows what is to be taken; called in a thread.
        state: Where an earlier reading stood.
    """

    def __init__(
        self,
        source: Source,
        epochs: int | None,
        load: Callable[[Source, int, Sequence[Row]], list[Item]],
        state: dict[str, Any] | None = None,
    ) -> None:
        self.source = source
        self._epochs = epochs
        self._load = load
        state = state or {}
        self.epoch: int = state.get("epoch", 0)
        """The pass that the next row belongs to."""
        self.next: int = state.get("next", 0)
        """The number of that row."""
        self.examples: int = state.get("examples", 0)
        """Examples taken so far."""
        self._before: int = state.get("before", 0)
        """Those of earlier passes."""
        self._last: tuple[int, str] | None = tuple(state["last"]) if state.get("last") else None
        """The number and the mark of the row that was taken last."""
        self.total: int | None = None
        """Rows of the source, if that was known when it was last looked at."""
        self.ready: deque[Item] = deque()

    def state(self) -> dict[str, Any]:
        """Where this one stands."""
        return {
            "epoch": self.epoch,
            "next": self.next,
            "examples": self.examples,
            "before": self._before,
            "last": self._last and list(self._last),
        }

    @property
    def ended(self) -> bool:
        """Whether all passes are over."""
        if self._epochs is None or self.ready or not self._is_at_end:
            return False
        return not self.total or self.epoch + 1 >= self._epochs

    def look(self) -> None:
        """See whether the end is known by now. Blocks.

        Raises:
            ConfigError: The end lies before what was read.
        """
        self.total = self.source.total()
        if self.total is not None and self.next > self.total:
            raise ConfigError(
                f"{self.source.name} has {self.total} rows, and the checkpoint stands behind row "
                f"{self.next}: it is of another stream"
            )

    def is_there(self) -> bool:
        """Whether the row that was taken last is in the source, which may be on its way there. Blocks.

        Raises:
            ConfigError: Another one stands in its place, or none ever will.
        """
        if self._last is None:
            return True
        seq, mark = self._last
        row = next(iter(self.source.pick([seq])), None)
        gone = row is None and self.source.total() is not None
        if gone or (row is not None and mark_of(row) != mark):
            raise ConfigError(
                f"{self.source.name}: row {seq} (counted from 0) is another one than was trained on: this is "
                f"not the stream that this training stood in"
            )
        return row is not None

    def read(self) -> list[Item]:
        """What comes next, as far as it is there. Blocks; nothing but the pass changes.

        The end may be known only when it is met: the next pass then begins at once, so that it makes no
        difference where in a source a process has begun.
        """
        while True:
            self.look()
            if self._is_at_end and not self.ended:
                self._begin_pass()
            rows = self.source.fetch(self.next, BATCH_ROWS)
            self.look()
            if rows or not self._is_at_end or self.ended:
                return self._load(self.source, self.epoch, rows)

    def take(self) -> Item:
        """The next of those that are ready."""
        item = self.ready.popleft()
        self.next = item.key.seq + 1
        self._last = (item.key.seq, item.mark)
        self.examples += isinstance(item.made, Example)
        return item

    def rows_left(self) -> int | None:
        """Rows still to be taken in all passes, where that is known."""
        if self.total is None or self._epochs is None:
            return None
        return max(0, (self._epochs - self.epoch) * self.total - self.next)

    def rows_taken(self) -> int:
        """Rows taken in all passes so far, those that made no example among them."""
        return self.epoch * (self.total or 0) + self.next

    @property
    def _is_at_end(self) -> bool:
        return self.total is not None and self.next >= self.total

    def _begin_pass(self) -> None:
        if self._epochs is None and self.examples == self._before:
            raise ConfigError(f"train.mix: {self.source.name} holds nothing that can be trained on")
        self.epoch, self.next, self._before = self.epoch + 1, 0, self.examples
