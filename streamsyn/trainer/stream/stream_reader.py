"""Reads the stream, and what is mixed into it, ahead of the training.

`StreamReader` returns examples one at a time: after k examples of the stream it has returned round(k *
weight) examples of each source in `train.mix`. The order depends on counts alone, never on time.
`SourceReader` is the position in one source. Rows that were read ahead are not part of any state: they are
read again after a restart.
"""

import asyncio
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from operator import itemgetter
from typing import Any, Protocol, TypeVar

import orjson
import structlog

from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import ConfigError, SinkError
from streamsyn.records import digest
from streamsyn.trainer.examples import (
    BadRow,
    Changed,
    Dropped,
    Example,
    HeldOut,
    Key,
    Made,
    Row,
    row_is_held_out,
)
from streamsyn.trainer.sources.source import HasContexts, Source, Sources
from streamsyn.trainer.stream.shortening import context_seqs, shortened

log = structlog.get_logger()

BATCH_ROWS = 32
"""Rows that are read and tokenized together."""
HELD_OUT = "its seed is held out (train.holdout): it is never trained on"
_MAX_LOGGED = 5
"""Dropped rows that are logged one by one, for each reason."""

T = TypeVar("T")


class Rendering(Protocol):
    """Turns rows into examples."""

    def render_batch(self, rows: Sequence[tuple[dict[str, Any], Key]]) -> list[Example | Dropped]:
        """For each row its example, or the reason why there is none. Blocks."""
        ...

    def render_around(
        self,
        row: dict[str, Any],
        key: Key,
        context: str,  # noqa: ARG002 - renderings that cut nothing need not look at it
    ) -> Example | Dropped:
        """The example of a row with only as much of `context`, which is in its first message, as fits."""
        return self.render_batch([(row, key)])[0]


class HeldOutChoice:
    """The held-out samples to evaluate: about as many of each task, those with the smallest hashes of their
    ids, so that neither the order of the stream nor its most frequent task decides.

    Which ones are chosen depends only on what was added, not on its order.

    Args:
        size: Maximum number of samples.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._by_task: dict[str, list[tuple[bytes, Key, HeldOut]]] = {}
        """For each task its samples by rising hash. Those removed would not be chosen later either: of each
        task, those with the smallest hashes stay.
        """

    def __len__(self) -> int:
        return sum(map(len, self._by_task.values()))

    def add(self, one: HeldOut) -> None:
        """Add a sample, and remove the last one of the largest task if there are too many."""
        of_task = self._by_task.setdefault(one.example.task, [])
        insort(of_task, (digest("evaluate", one.example.id), one.example.key, one), key=itemgetter(0, 1))
        if len(self) > self._size:
            largest = max(self._by_task.values(), key=lambda some: (len(some), some[-1][:2]))
            largest.pop()
            if not largest:  # there are more tasks than samples to choose
                self._by_task = {task: some for task, some in self._by_task.items() if some}

    def samples(self) -> list[HeldOut]:
        """The samples chosen, in the order of the stream."""
        chosen = (entry for of_task in self._by_task.values() for entry in of_task)
        return [one for _, _, one in sorted(chosen, key=itemgetter(1))]


class StreamReader:
    """Returns the examples of the stream and of what is mixed into it, in a fixed order.

    Rows are read and tokenized in one thread. Rows that cannot be trained on are counted, and so are rows of
    held-out seeds in `train.mix`; those of the stream are kept apart for evaluation.

    Args:
        section: The section `train`.
        sources: The stream and what is mixed into it.
        renderer: Turns rows into examples.
        state: `state()` of an earlier reader; None at the beginning.

    Raises:
        ConfigError: The state belongs to a different stream.
    """

    def __init__(
        self, section: TrainSection, sources: Sources, renderer: Rendering, state: dict[str, Any] | None
    ) -> None:
        self._section = section
        self._renderer = renderer
        self._thread = ThreadPoolExecutor(1, "stream")
        state = state or {"source": sources.stream.name, "mix": {}, "counts": {}, "dropped": {}}
        if state["source"] != sources.stream.name:
            raise ConfigError(
                f"--from: the checkpoint was trained on a stream of kind {state['source']!r}, not "
                f"{sources.stream.name!r}; use the same stream, or another --out"
            )
        self._stream = SourceReader(sources.stream, section.epochs, self._load, state.get("stream"))
        self._mix = [
            (SourceReader(one.source, None, self._load, state["mix"].get(one.source.name)), one.weight)
            for one in sources.mix
        ]
        self._sources: dict[str, Source] = {
            source.name: source for source in (sources.stream, *(one.source for one in sources.mix))
        }
        if len(self._sources) <= len(self._mix):
            raise ConfigError("train.mix: the same path is given twice; give it once, with a higher weight")
        self.counts: Counter[str] = Counter(state["counts"])
        """Everything returned so far: rows `read`, rows `held_out`, and `examples` with their `tokens` and
        `targets`."""
        self.dropped: Counter[str] = Counter(state["dropped"])
        """Rows that cannot be trained on, by reason."""
        self.template_changes: Counter[str] = Counter(state.get("changed", {}))
        """Examples whose `answers` or `prompts` the chat template changes."""
        self.held_out = HeldOutChoice(section.holdout_samples)
        """What is kept for evaluation."""
        self._warned_behind = False

    def state(self) -> dict[str, Any]:
        """The position in all sources; can be written as JSON."""
        return {
            "source": self._stream.source.name,
            "stream": self._stream.state(),
            "mix": {reader.source.name: reader.state() for reader, _ in self._mix},
            "counts": dict(self.counts),
            "dropped": dict(self.dropped),
            "changed": dict(self.template_changes),
        }

    @property
    def ended(self) -> bool:
        """Whether all examples have been returned."""
        return self._stream.ended and self._next_reader() is self._stream

    def examples_left(self) -> float | None:
        """About how many examples remain; None while the end is not known."""
        rows = self._stream.rows_left()
        if rows is None:
            return None
        per_row = self._stream.examples / max(1, self._stream.rows_taken())
        return rows * per_row * (1 + sum(weight for _, weight in self._mix))

    async def next(self) -> Example | None:
        """The next example; None when it has not been written yet, or all have been returned.

        Raises:
            StreamsynError: A source cannot be read.
        """
        while True:
            reader = self._next_reader()
            if not reader.ready and not reader.ended:
                reader.ready.extend(await self._in_thread(reader.read))
            if not reader.ready:
                return None
            made = reader.take()
            if example := self._count(reader.last_key, made):
                return example

    async def changed(self, timeout_s: float) -> None:
        """Return when the stream may have more rows, and after `timeout_s` seconds at the latest."""
        await self._stream.source.changed(timeout_s)

    async def reload(self, keys: Iterable[Key]) -> dict[Key, Made] | None:
        """Load again rows that were returned before the checkpoint.

        Rows that no longer make an example (because `train.seq_len` is smaller now, say) are counted as
        dropped.

        Returns:
            What each key makes now; None while a row is not there, but may be written again.

        Raises:
            ConfigError: A row's source is no longer given, or its content has changed.
            SinkError: A row is missing for good.
        """
        wanted = sorted(set(keys))
        loaded = await self._in_thread(lambda: self._reload(wanted))
        if loaded is None:
            return None
        for key, made in loaded.items():
            if isinstance(made, Dropped):
                self._drop(key, made)
        return loaded

    def close(self) -> None:
        """Close the sources and end the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        for source in self._sources.values():
            source.close()

    async def _in_thread(self, call: Callable[[], T]) -> T:
        # One thread: a call that was cancelled ends before the next one begins.
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _next_reader(self) -> "SourceReader":
        """The reader of the next example. Depends on counts alone."""
        for reader, weight in self._mix:
            if reader.examples < int(self._stream.examples * weight + 0.5):
                return reader
        return self._stream

    def _count(self, key: Key, made: Made) -> Example | None:
        self.counts["read"] += 1
        match made:
            case Example() as example:
                if "targets" in self.counts or not self.counts["examples"]:
                    self.counts["targets"] += example.target_tokens  # older checkpoints have no count of them
                self.counts["examples"] += 1
                self.counts["tokens"] += example.length
                if example.changed is not None:
                    self._count_changed(key, example.changed)
                return example
            case Dropped() as dropped:
                self._drop(key, dropped)
            case HeldOut() as held_out if key.epoch == 0:
                self.counts["held_out"] += 1
                self.held_out.add(held_out)
        return None

    def _count_changed(self, key: Key, changed: Changed) -> None:
        self.template_changes[changed] += 1
        if self.template_changes[changed] <= _MAX_LOGGED:
            log.warning(
                "stream.changed",
                source=key.source,
                row=key.seq,
                why=f"the chat template changes its {changed[:-1]}: see train.chat_template",
            )

    def _drop(self, key: Key, dropped: Dropped) -> None:
        self.dropped[dropped.reason] += 1
        if self.dropped[dropped.reason] <= _MAX_LOGGED:
            log.warning(
                "stream.dropped", source=key.source, row=key.seq, reason=dropped.reason, why=dropped.detail
            )

    def _load(self, source: Source, keys: Sequence[Key], rows: Sequence[Row]) -> list[Made]:
        """What each row makes. Blocks."""
        good = [(row, key) for row, key in zip(rows, keys, strict=True) if not isinstance(row, BadRow)]
        rendered = zip(good, self._renderer.render_batch(good), strict=True)
        made = {key: self._shortened(source, row, key, one) for (row, key), one in rendered}
        return [
            Dropped("bad_row", row.problem) if isinstance(row, BadRow) else self._hold_out(row, made[key])
            for row, key in zip(rows, keys, strict=True)
        ]

    def _shortened(
        self, source: Source, row: dict[str, Any], key: Key, made: Example | Dropped
    ) -> Example | Dropped:
        """What a row makes: if its prompt was cut, with fewer distractors where their texts are known."""
        if not isinstance(made, Example) or not made.cut or not isinstance(source, HasContexts):
            return made
        seqs = context_seqs(row)
        texts = None if seqs is None else source.contexts(row, seqs)
        if texts is None:
            return made
        render = self._renderer
        shorter = shortened(row, key, texts, lambda *one: render.render_batch([one])[0], render.render_around)
        return made if shorter is None else shorter

    def _hold_out(self, row: dict[str, Any], made: Example | Dropped) -> Made:
        if isinstance(made, Dropped) or not row_is_held_out(row, self._section.holdout):
            return made
        if made.key.source == self._stream.source.name:
            return HeldOut(made, row)
        return Dropped("held_out", HELD_OUT)

    def _reload(self, keys: Sequence[Key]) -> dict[Key, Made] | None:
        self._stream.update_total()
        if not all(one.has_last_row() for one in (self._stream, *(reader for reader, _ in self._mix))):
            self._warn_behind()
            return None
        found: dict[Key, Made] = {}
        for name, epoch in sorted({(key.source, key.epoch) for key in keys}):
            source = self._sources.get(name)
            if source is None:
                raise ConfigError(
                    f"train.mix: the checkpoint holds examples of {name}, which is no longer in train.mix"
                )
            wanted = [key for key in keys if (key.source, key.epoch) == (name, epoch)]
            rows, loaded = source.pick([key.seq for key in wanted]), 0
            while some := list(islice(rows, BATCH_ROWS)):
                of_rows = wanted[loaded : loaded + len(some)]
                found |= zip(of_rows, self._load(source, of_rows, some), strict=True)
                loaded += len(some)
            if loaded < len(wanted):
                if source.total() is None:
                    return None
                raise SinkError(f"{name}: rows that the checkpoint has read are missing")
        return found

    def _warn_behind(self) -> None:
        if not self._warned_behind:
            self._warned_behind = True
            log.warning(
                "stream.behind",
                row=self._stream.next,
                why="the checkpoint has read up to this row, and the stream has not reached it (again) yet",
            )


def row_digest(row: Row) -> str:
    """A digest of what a row holds."""
    held = None if isinstance(row, BadRow) else row
    return digest(orjson.dumps(held, default=str, option=orjson.OPT_SORT_KEYS)).hex()


class SourceReader:
    """The position in one source, over all passes, and the rows that were read ahead of it.

    Args:
        source: What is read.
        epochs: Number of passes; None to read the source in an endless cycle.
        load: Turns rows into examples; called in a thread.
        state: `state()` of an earlier reader.
    """

    def __init__(
        self,
        source: Source,
        epochs: int | None,
        load: Callable[[Source, Sequence[Key], Sequence[Row]], list[Made]],
        state: dict[str, Any] | None = None,
    ) -> None:
        self.source = source
        self._epochs = epochs
        self._load = load
        state = state or {"epoch": 0, "next": 0, "examples": 0, "before": 0, "last": None}
        self.epoch: int = state["epoch"]
        """The pass that the next row belongs to."""
        self.next: int = state["next"]
        """The number of the next row."""
        self.examples: int = state["examples"]
        """Examples taken so far."""
        self._before: int = state["before"]
        """Examples taken in earlier passes."""
        self._last: tuple[int, Row | str] | None = tuple(state["last"]) if state["last"] else None
        """The number of the last row taken, and its content, or the digest of that."""
        self.total: int | None = None
        """Rows of the source; None while that was not known at the last look."""
        self.ready: deque[tuple[Row, Made]] = deque()
        """Rows read ahead, and what each makes."""

    def state(self) -> dict[str, Any]:
        """The position; can be written as JSON."""
        if self._last is not None and not isinstance(self._last[1], str):
            self._last = (self._last[0], row_digest(self._last[1]))
        return {
            "epoch": self.epoch,
            "next": self.next,
            "examples": self.examples,
            "before": self._before,
            "last": self._last and list(self._last),
        }

    @property
    def ended(self) -> bool:
        """Whether all rows of all passes have been taken."""
        if self._epochs is None or self.ready or not self._is_at_end:
            return False
        return not self.total or self.epoch + 1 >= self._epochs

    def update_total(self) -> None:
        """Ask the source whether its end is known by now. Blocks.

        Raises:
            ConfigError: The source ends before the position.
        """
        self.total = self.source.total()
        if self.total is not None and self.next > self.total:
            raise ConfigError(
                f"{self.source.name} has {self.total} rows, but the checkpoint has read {self.next}: it "
                "belongs to a different stream; use another --out"
            )

    def has_last_row(self) -> bool:
        """Whether the last row taken is in the source again, which may still be writing it. Blocks.

        Raises:
            ConfigError: The row is missing for good, or its content has changed.
        """
        if self._last is None:
            return True
        seq, content = self._last
        row = next(iter(self.source.pick([seq])), None)
        gone = row is None and self.source.total() is not None
        if gone or (row is not None and content not in (row, row_digest(row))):
            raise ConfigError(
                f"{self.source.name}: row {seq} (counted from 0) {'is missing' if gone else 'has changed'} "
                "since it was trained on: this is not the stream of the checkpoint; use another --out"
            )
        return row is not None

    def read(self) -> list[tuple[Row, Made]]:
        """The rows that come next and what they make, as far as they are written. Blocks; changes nothing but
        the pass.

        The end of a source may become known only when it is reached. The next pass then begins at once, so
        that the order does not depend on where a process started to read.
        """
        while True:
            self.update_total()
            if self._is_at_end and not self.ended:
                self._begin_pass()
            rows = self.source.fetch(self.next, BATCH_ROWS)
            self.update_total()
            if rows or not self._is_at_end or self.ended:
                keys = [Key(self.source.name, self.epoch, seq) for seq, _ in enumerate(rows, self.next)]
                return list(zip(rows, self._load(self.source, keys, rows), strict=True))

    def take(self) -> Made:
        """Take the next row of those read ahead; return what it makes."""
        row, made = self.ready.popleft()
        self._last = (self.next, row)
        self.next += 1
        self.examples += isinstance(made, Example)
        return made

    @property
    def last_key(self) -> Key:
        """The key of the last row taken."""
        return Key(self.source.name, self.epoch, self.next - 1)

    def rows_left(self) -> int | None:
        """Rows that remain in all passes; None while that is not known."""
        if self.total is None or self._epochs is None:
            return None
        return max(0, (self._epochs - self.epoch) * self.total - self.next)

    def rows_taken(self) -> int:
        """Rows taken in all passes, dropped rows included."""
        return self.epoch * (self.total or 0) + self.next

    @property
    def _is_at_end(self) -> bool:
        return self.total is not None and self.next >= self.total

    def _begin_pass(self) -> None:
        if self._epochs is None and self.examples == self._before:
            raise ConfigError(f"train.mix: {self.source.name} has no row that can be trained on")
        self.epoch, self.next, self._before = self.epoch + 1, 0, self.examples
