"""Rows, sources and renderings for the tests of the stream's side of the trainer."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy
import orjson

from streamsyn.config.command_sections import TrainSection
from streamsyn.trainer.examples import BadRow, Dropped, End, Example, Idle, Key, Row, StepPlan
from streamsyn.trainer.sources.source import Sources
from streamsyn.trainer.stream.planner import Planner
from streamsyn.trainer.stream.stream_reader import Rendering


def row(number: int, length: int = 10, **more: Any) -> dict[str, Any]:
    """A row of which Lengths makes an example of `length` tokens."""
    return {"id": f"row-{number}", "seed_id": f"seed-{number}", "task": "qa", "length": length, **more}


def example(length: int, number: int = 0, answer: int = 1) -> Example:
    """An example of this number of tokens."""
    tokens = numpy.arange(length, dtype=numpy.int32)
    return Example(Key("run", 0, number), f"row-{number}", "qa", tokens, length - answer)


class Lengths(Rendering):
    """Rendering: the number of tokens is in the row; more than `seq_len` is over-long."""

    def __init__(self, seq_len: int) -> None:
        self._seq_len = seq_len

    def render_batch(self, rows: Sequence[tuple[dict[str, Any], Key]]) -> list[Example | Dropped]:
        return [self._render(*one) for one in rows]

    def _render(self, row: dict[str, Any], key: Key) -> Example | Dropped:
        length = row["length"]
        if length > self._seq_len:
            return Dropped("overlong", f"{length} tokens")
        tokens = numpy.full(length, key.seq, dtype=numpy.int32)
        return Example(key, row["id"], row["task"], tokens, length - 1)


class Arriving:
    """Source: rows that arrive in chunks, each some time after the one before: (seconds, number of rows).

    Whatever the chunks leave comes at the end with the last one.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any] | None],
        chunks: Iterable[tuple[float, int]] = (),
        name: str = "run",
    ) -> None:
        self.name = name
        self._rows = rows
        self._chunks = [*chunks]
        self._there = 0 if self._chunks else len(rows)
        self._due = 0.0
        """When the next chunk comes; 0 before somebody waits for it."""
        self.closed = False

    def fetch(self, first: int, limit: int) -> list[Row]:
        end = min(first + limit, self._there)
        return [self._row(seq) for seq in range(first, end)]

    def total(self) -> int | None:
        return None if self._chunks else len(self._rows)

    def pick(self, seqs: Sequence[int]) -> Iterator[Row]:
        yield from map(self._row, seqs)

    def _row(self, seq: int) -> Row:
        row = self._rows[seq]
        return BadRow("bad") if row is None else row

    async def changed(self, timeout_s: float) -> None:
        now = asyncio.get_running_loop().time()
        if not self._chunks:
            await asyncio.sleep(timeout_s)
            return
        seconds, rows = self._chunks[0]
        self._due = self._due or now + seconds
        await asyncio.sleep(min(timeout_s, max(0.0, self._due - now)))
        if self._due - now <= timeout_s:
            del self._chunks[0]
            self._due = 0.0
            self._there = min(len(self._rows), self._there + rows) if self._chunks else len(self._rows)

    def close(self) -> None:
        self.closed = True


def section(**given: Any) -> TrainSection:
    """Two rows of 100 tokens a step, a buffer of 8 examples."""
    small = {"seq_len": 100, "rows_per_step": 2, "shuffle_size": 8, "shuffle_min": 4}
    return TrainSection.model_validate({**small, **given})


def planner(
    sources: Sources, state: Any = None, rendering: Rendering | None = None, *, ranks: int = 1, **given: Any
) -> Planner:
    """A planner of `section(**given)`; the state goes through JSON, as in a checkpoint."""
    train = section(**given)
    state = orjson.loads(orjson.dumps(state))
    return Planner(train, 7, sources, rendering or Lengths(train.seq_len), state, ranks=ranks)


async def plans(stream: Planner, timeout_s: float = 1000.0) -> list[StepPlan]:
    """All plans up to the end."""
    made = []
    while not isinstance(step := await stream.next(timeout_s), End):
        if not isinstance(step, Idle):
            made.append(step)
    stream.close()
    return made


def keys(steps: Iterable[StepPlan]) -> list[Key]:
    """What was trained on, in order."""
    return [one.key for step in steps for one in step.examples()]
