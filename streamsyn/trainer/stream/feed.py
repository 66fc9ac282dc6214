"""How far one source has been read, and what was read ahead of that.

The stream and what is mixed into it, as one sequence of examples in which the clock has no say.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

import orjson
import structlog

from streamsyn.config.train_section import TrainSection
from streamsyn.errors import ConfigError, SinkError
from streamsyn.records import digest
from streamsyn.trainer.examples import Dropped, Example, HeldOut, Key, Row, is_held_out
from streamsyn.trainer.sources.source import Source, Sources

log = structlog.get_logger()

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


class SourceReader:
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


T = TypeVar("T")

_SHOWN = 5
"""Dropped rows that are logged one by one, of each kind."""


class Rendering(Protocol):
    """Makes examples of rows."""

    def render_batch(self, rows: Sequence[tuple[dict[str, Any], Key]]) -> list[Example | Dropped]:
        """For each row an example, or why there is none. Blocks."""
        ...


@dataclass(frozen=True, slots=True)
class _MixedReading:
    """A source that is mixed in, and how many examples of it are due."""

    reading: SourceReader
    weight: float

    def is_due(self, stream_examples: int) -> bool:
        """Whether the next example comes from here. Depends on counts alone."""
        return self.reading.examples < int(stream_examples * self.weight + 0.5)


class Feed:
    """Hands out examples one by one: after k of the stream, round(k * weight) of each source mixed in.

    Rows are read and rendered in a thread of its own. Rows that make no example are counted. Those of
    seeds that are held out are kept apart, as many as are wanted.

    Args:
        section: The section `train`.
        sources: What is read.
        renderer: Makes examples.
        state: Where an earlier feed stood.

    Raises:
        ConfigError: The state is that of another stream.
    """

    def __init__(
        self, section: TrainSection, sources: Sources, renderer: Rendering, state: dict[str, Any] | None
    ) -> None:
        self._section = section
        self._renderer = renderer
        self._thread = ThreadPoolExecutor(1, "stream")
        state = state or {"source": sources.stream.name, "mix": {}, "counts": {}, "dropped": {}}
        if state["source"] != sources.stream.name:
            raise ConfigError(f"the checkpoint stands in {state['source']}, not in {sources.stream.name}")
        self._stream = SourceReader(sources.stream, section.epochs, self._load, state.get("stream"))
        self._mix = [
            _MixedReading(
                SourceReader(one.source, None, self._load, state["mix"].get(one.source.name)), one.weight
            )
            for one in sources.mix
        ]
        self._sources: dict[str, Source] = {
            source.name: source for source in (sources.stream, *(one.source for one in sources.mix))
        }
        if len(self._sources) <= len(self._mix):
            raise ConfigError("train.mix: a path is given twice; give it a higher weight")
        self.counts: Counter[str] = Counter(state["counts"])
        """Rows `read`, those `held_out`, and `examples` and their `tokens`: all that was taken."""
        self.dropped: Counter[str] = Counter(state["dropped"])
        """Rows that made no example, by reason."""
        self.held_out: list[HeldOut] = []
        """What is kept for evaluation, in the order of the stream."""
        self._said_behind = False

    def state(self) -> dict[str, Any]:
        """Where this one stands; can be written as JSON."""
        return {
            "source": self._stream.source.name,
            "stream": self._stream.state(),
            "mix": {one.reading.source.name: one.reading.state() for one in self._mix},
            "counts": dict(self.counts),
            "dropped": dict(self.dropped),
        }

    @property
    def ended(self) -> bool:
        """Whether everything was handed out."""
        return self._stream.ended and self._due() is self._stream

    def examples_left(self) -> float | None:
        """About how many examples are still to come, where the end is known."""
        rows = self._stream.rows_left()
        if rows is None:
            return None
        a_row = self._stream.examples / max(1, self._stream.rows_taken())
        return rows * a_row * (1 + sum(one.weight for one in self._mix))

    async def next(self) -> Example | None:
        """The next example; None when it is not there yet, or all are handed out.

        Raises:
            StreamsynError: A source cannot be read.
        """
        while True:
            reading = self._due()
            if not reading.ready and not reading.ended:
                reading.ready.extend(await self._in_thread(reading.read))
            if not reading.ready:
                return None
            if example := self._take(reading.take()):
                return example

    async def changed(self, timeout_s: float) -> None:
        """Return when the stream may have brought something, and after `timeout_s` at the latest."""
        await self._stream.source.changed(timeout_s)

    async def again(self, keys: Iterable[Key]) -> dict[Key, Example | Dropped | HeldOut] | None:
        """What becomes of rows that were taken before; None when one is not there now but may come again.

        Those that no longer make an example (the model's tokenizer is another one) are counted as dropped.

        Raises:
            ConfigError: One is of a source that is no longer given.
            SinkError: One is gone for good.
        """
        wanted = sorted(set(keys))
        items = await self._in_thread(lambda: self._again(wanted))
        if items is None:
            return None
        for item in items:
            if isinstance(item.made, Dropped):
                self._drop(item, item.made)
        return {item.key: item.made for item in items}

    def close(self) -> None:
        """Let go of the thread and the sources."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        for source in self._sources.values():
            source.close()

    async def _in_thread(self, call: Callable[[], T]) -> T:
        # One thread: what a cancelled call was doing is over before the next one begins.
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _due(self) -> SourceReader:
        """Whose turn it is."""
        due = (one.reading for one in self._mix if one.is_due(self._stream.examples))
        return next(due, self._stream)

    def _take(self, item: Item) -> Example | None:
        self.counts["read"] += 1
        match item.made:
            case Example() as example:
                self.counts["examples"] += 1
                self.counts["tokens"] += example.length
                return example
            case Dropped() as dropped:
                self._drop(item, dropped)
            case HeldOut() as kept:
                self.counts["held_out"] += item.key.epoch == 0
                if item.key.epoch == 0 and len(self.held_out) < self._section.holdout_samples:
                    self.held_out.append(kept)
        return None

    def _say_behind(self) -> None:
        if not self._said_behind:
            self._said_behind = True
            log.warning(
                "stream.behind",
                row=self._stream.next,
                why="the training stands behind this row, and the stream has not come to it (again) yet",
            )

    def _drop(self, item: Item, dropped: Dropped) -> None:
        self.dropped[dropped.reason] += 1
        if self.dropped[dropped.reason] <= _SHOWN:
            key = item.key
            log.warning(
                "stream.dropped", source=key.source, row=key.seq, reason=dropped.reason, why=dropped.detail
            )

    def _load(self, source: Source, epoch: int, rows: Sequence[Row]) -> list[Item]:
        """What becomes of rows. Blocks."""
        keys = [Key(source.name, epoch, row.seq) for row in rows]
        good = [(row.value, key) for row, key in zip(rows, keys, strict=True) if row.value is not None]
        made = dict(zip((key for _, key in good), self._renderer.render_batch(good), strict=True))
        return [
            Item(
                key,
                self._kept_apart(row, made[key]) if key in made else Dropped("bad_row", row.problem),
                mark_of(row),
            )
            for row, key in zip(rows, keys, strict=True)
        ]

    def _kept_apart(self, row: Row, made: Example | Dropped) -> Example | Dropped | HeldOut:
        if isinstance(made, Dropped) or row.value is None or made.key.source != self._stream.source.name:
            return made
        return HeldOut(made, row.value) if is_held_out(row.value, self._section.holdout) else made

    def _again(self, keys: Sequence[Key]) -> list[Item] | None:
        self._stream.look()
        if not all(one.is_there() for one in (self._stream, *(mixed.reading for mixed in self._mix))):
            self._say_behind()
            return None
        found: list[Item] = []
        for name, epoch in sorted({(key.source, key.epoch) for key in keys}):
            source = self._sources.get(name)
            if source is None:
                raise ConfigError(f"the checkpoint holds examples of {name}, which is no longer in train.mix")
            wanted = [key.seq for key in keys if (key.source, key.epoch) == (name, epoch)]
            rows, there = source.pick(wanted), len(found)
            while some := list(islice(rows, BATCH_ROWS)):
                found += self._load(source, epoch, some)
            if len(found) < there + len(wanted):
                if source.total() is None:
                    return None
                raise SinkError(f"{name} no longer holds all rows that the checkpoint has read")
        return found
