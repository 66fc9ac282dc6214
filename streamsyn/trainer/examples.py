"""What flows through the trainer: row -> Example | Dropped | HeldOut -> StepPlan.

A row of a source is a dict; an Example is a row as tokens; a StepPlan is what one optimizer step trains on.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy
from numpy.typing import NDArray

from streamsyn.records import digest, is_held_out

Tokens: TypeAlias = NDArray[numpy.int32]

DropReason = Literal["overlong", "empty_answer", "template", "bad_row", "special_tokens", "held_out"]
Changed: TypeAlias = Literal["answers", "prompts"]
"""What a chat template renders other than it stands in the row."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row of a source that is not a JSON object, and why."""

    problem: str


Row: TypeAlias = dict[str, Any] | BadRow
"""A row of a source."""


class Key(NamedTuple):
    """Identifies an example: its source, the pass over the source, its row. A list in JSON."""

    source: str
    epoch: int
    seq: int


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A sample as tokens.

    Attributes:
        tokens: int32 [n]: prompt, answer, stop token.
        loss_from: The targets are tokens[loss_from:]: the answer and its stop token.
        seen_at: When this process made it from its row, in seconds on the monotonic clock.
        cut: Whether tokens in the middle of the prompt were cut out, because it was too long.
        changed: What the chat template has changed; None if messages stand in the text as in the row.
    """

    key: Key
    id: str
    task: str
    tokens: Tokens
    loss_from: int
    seen_at: float = field(default_factory=time.monotonic, repr=False)
    changed: Changed | None = None
    cut: bool = False

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def target_tokens(self) -> int:
        """Number of tokens with loss; at least one."""
        return len(self.tokens) - self.loss_from


PackedRow: TypeAlias = tuple[Example, ...]
"""Whole examples side by side in one sequence."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that cannot be trained on."""

    reason: DropReason
    detail: str


@dataclass(frozen=True, slots=True)
class HeldOut:
    """An example that is evaluated and never trained on, with its row."""

    example: Example
    row: dict[str, Any] = field(repr=False)


Made: TypeAlias = Example | Dropped | HeldOut
"""What a row makes."""


def row_is_held_out(row: dict[str, Any], share: float) -> bool:
    """Whether the row's seed is held out for evaluation.

    A row without `seed_id` and `id` is known by its instruction and answer, as a seed without an id is.

    Args:
        row: A row of the stream, of `train.mix` or of `train.control`.
        share: Share of all seeds to hold out, 0 to 1.
    """
    if not share:
        return False
    seed_id = row.get("seed_id") or row.get("id")
    if isinstance(seed_id, str):
        return is_held_out(seed_id, share)
    pair = _pair(row.get("messages"))
    return pair is not None and is_held_out(digest(*pair).hex(), share)


def _pair(messages: Any) -> tuple[str, str] | None:
    """Instruction and answer of a conversation of these two alone."""
    match messages:
        case [
            *before,
            {"role": "user", "content": str(asked)},
            {"role": "assistant", "content": str(answer)},
        ]:
            if all(isinstance(one, dict) and one.get("role") == "system" for one in before):
                return asked, answer
    return None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one optimizer step trains on.

    Attributes:
        rows: `train.rows_per_step` rows of whole examples, each with up to `train.seq_len` tokens; with
            `train.packing = "none"` a row for each of these examples. With R ranks, row i is for rank i % R.
            Rows may be empty when the stream has ended or paused, and so that each rank gets equally many.
        state: The position in the stream after this step; can be written as JSON.
        left_steps: About how many steps remain after this one; None while the end is not known.
        flushed: Whether the plan was made because the stream has ended or paused, with rows not full.
        fill: Tokens compared with those of full steps, at most 1; always 1 unless `flushed`.
        usual_count: Mean number of examples of full steps; None if `flushed`.
        usual_targets: Mean number of tokens with loss of full steps; None if `flushed`, or not known.
    """

    rows: tuple[PackedRow, ...]
    state: dict[str, Any] = field(repr=False)
    left_steps: int | None = None
    flushed: bool = False
    fill: float = 1.0
    usual_count: float | None = None
    usual_targets: float | None = None

    def examples(self) -> Iterator[Example]:
        """All examples, row by row."""
        for row in self.rows:
            yield from row

    @property
    def tokens(self) -> int:
        """Tokens in all rows."""
        return sum(example.length for example in self.examples())

    @property
    def target_tokens(self) -> int:
        """Tokens with loss in all rows."""
        return sum(example.target_tokens for example in self.examples())

    @property
    def count(self) -> int:
        """Examples in all rows."""
        return sum(map(len, self.rows))


@dataclass(frozen=True, slots=True)
class Idle:
    """There is no plan yet.

    Attributes:
        waited_s: Seconds since the last example.
        stalled: Whether that is longer than `train.stall_s`.
    """

    waited_s: float
    stalled: bool


@dataclass(frozen=True, slots=True)
class End:
    """The stream has ended and everything in it is in a plan."""

    state: dict[str, Any] = field(repr=False)
