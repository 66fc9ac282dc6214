"""Which seeds are kept for evaluation: drawn by their ids, so that it is the same ones in every run.

What flows through the trainer, in the order in which it arises.

    Row -> Example | Dropped -> StepPlan

A Row is what a source holds; an Example is it as tokens; a StepPlan is what one optimizer step takes.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy
from numpy.typing import NDArray

from streamsyn.records import digest


@dataclass(frozen=True, slots=True)
class HeldOut:
    """An example that is evaluated and never trained on, with the row it was made of."""

    example: "Example"
    row: dict[str, Any] = field(repr=False)


def is_held_out(row: dict[str, Any], share: float) -> bool:
    """Whether a row belongs to one of the seeds that are held out: `share` of all, whatever the order.

    All drafts of a seed go the same way. A row without `seed_id` and `id` is never held out.
    """
    seed_id = row.get("seed_id") or row.get("id")
    if not share or not isinstance(seed_id, str):
        return False
    return int.from_bytes(digest("holdout", seed_id)[:8]) < share * 2**64


Tokens: TypeAlias = NDArray[numpy.int32]


class Key(NamedTuple):
    """Where an example stands: in which source, which pass over it, which row of it. A list in JSON."""

    source: str
    epoch: int
    seq: int


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a source, `seq` counted from 0. `value` is None for one that is no row; `problem` says why."""

    seq: int
    value: dict[str, Any] | None
    problem: str = ""


DropReason = Literal["overlong", "empty_answer", "template", "bad_row"]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that cannot be trained on."""

    reason: DropReason
    detail: str


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A sample as tokens.

    Attributes:
        tokens: int32 [n]: prompt, answer, stop token.
        loss_from: Targets are tokens[loss_from:]: the answer and its stop token.
        seen_at: When this process made it of its row, on the monotonic clock.
    """

    key: Key
    id: str
    task: str
    tokens: Tokens
    loss_from: int
    seen_at: float = field(default_factory=time.monotonic, repr=False)

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.tokens)

    @property
    def target_tokens(self) -> int:
        """Tokens that carry loss; at least one."""
        return len(self.tokens) - self.loss_from


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one optimizer step trains on.

    Attributes:
        rows: `train.rows_per_step` rows of whole examples, each of `train.seq_len` tokens at most. With R
            ranks, row i is for rank i % R. Rows may be empty when the stream has ended or paused.
        state: Where the stream stands when this has been trained on; can be written as JSON.
        left_steps: About how many steps come after this one; None while the stream's end is not known.
        flushed: Whether it came because nothing more would come (soon), not because its rows were full.
    """

    rows: tuple[tuple[Example, ...], ...]
    state: dict[str, Any] = field(repr=False)
    left_steps: int | None = None
    flushed: bool = False

    def examples(self) -> Iterator[Example]:
        """All examples, row by row."""
        for row in self.rows:
            yield from row

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(example.length for example in self.examples())

    @property
    def target_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(example.target_tokens for example in self.examples())

    @property
    def count(self) -> int:
        """Examples in all rows."""
        return sum(map(len, self.rows))


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing to train on yet. `waited_s`: for so long nothing has come; `stalled`: that is too long."""

    waited_s: float
    stalled: bool


@dataclass(frozen=True, slots=True)
class End:
    """The stream has ended and everything in it was handed out."""

    state: dict[str, Any] = field(repr=False)
