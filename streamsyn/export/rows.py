"""A row of an export: a sample, and what was measured of its relevant context.

What the card tells of the rows: counts and distributions, in memory that rows do not add to.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pyarrow

from streamsyn.records import Sample

Row: TypeAlias = dict[str, Any]

SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("seed_id", pyarrow.string()),
        ("task", pyarrow.string()),
        ("instruction", pyarrow.string()),
        (
            "messages",
            pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])),
        ),
        ("n_tokens", pyarrow.int64()),
        ("target_tokens", pyarrow.int64()),
        ("context_seqs", pyarrow.list_(pyarrow.int64())),
        ("relevant_index", pyarrow.int64()),
        ("epoch", pyarrow.int64()),
        ("model", pyarrow.string()),
        ("context_gain", pyarrow.float64()),
        ("answer_score", pyarrow.float64()),
        ("closed_book_score", pyarrow.float64()),
        ("flags", pyarrow.list_(pyarrow.string())),
    ]
)
"""Columns, in this order in every format."""

_MEASURED = ("context_gain", "answer_score", "closed_book_score")


def measured(context: Row) -> Row:
    """What a row tells of the context that it is about, from that context's row in the log."""
    checks = context.get("checks") or {}
    figures: Row = {"model": context.get("model")}
    figures.update({name: checks.get(name) for name in _MEASURED})
    figures["flags"] = list(checks.get("flags") or ())
    return figures


def row_of(sample: Sample, epoch: int, figures: Row) -> Row:
    """The row of a sample."""
    more = {"epoch": epoch, **figures}
    # Not `asdict`, which copies the texts' lists.
    return {name: more[name] if name in more else getattr(sample, name) for name in SCHEMA.names}


def text_bytes(row: Row) -> int:
    """How long a row is, near enough: the bytes of its texts, and something for the rest."""
    return 256 + sum(_bytes(message["content"]) for message in row["messages"]) + 8 * len(row["context_seqs"])


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


_BITS = 7
"""Lengths are told apart by so many leading bits: to 1 %."""
_STEPS = 100
"""Scores are told apart by hundredths."""


@dataclass(slots=True)
class Distribution:
    """Numbers, counted in bins that are as wide as their size allows."""

    counts: Counter[int] = field(default_factory=Counter)
    number: int = 0
    total: float = 0
    most: float = 0

    @property
    def mean(self) -> float:
        """Their mean; 0 of none."""
        return self.total / self.number if self.number else 0.0

    def add(self, value: float, bin_of: int) -> None:
        """Count a number in its bin."""
        self.counts[bin_of] += 1
        self.number += 1
        self.total += value
        self.most = max(self.most, value)

    def quantile(self, share: float) -> int:
        """The bin below or at which this share of the numbers lies; 0 of none."""
        below, bin_of = 0, 0
        for bin_of in sorted(self.counts):
            below += self.counts[bin_of]
            if below >= share * self.number:
                break
        return bin_of


def length_bin(length: int) -> int:
    """The shortest length that counts as much as this one."""
    shift = max(0, length.bit_length() - _BITS)
    return length >> shift << shift


@dataclass(slots=True)
class RowMetrics:
    """What there is to say of some rows."""

    rows: int = 0
    tokens: Distribution = field(default_factory=Distribution)
    contexts: Distribution = field(default_factory=Distribution)
    """Contexts in a sample."""
    scores: dict[str, Distribution] = field(default_factory=dict)
    """Of each figure that was measured."""
    flags: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row) -> None:
        """Count a row."""
        self.rows += 1
        self.tokens.add(row["n_tokens"], length_bin(row["n_tokens"]))
        contexts = len(row["context_seqs"])
        self.contexts.add(contexts, length_bin(contexts))
        for name in ("context_gain", "answer_score", "closed_book_score"):
            if (value := row[name]) is not None:
                bins = round(min(max(value, -_STEPS), _STEPS) * _STEPS)
                self.scores.setdefault(name, Distribution()).add(value, bins)
        self.flags.update(row["flags"])


class Tally:
    """The figures of all rows, of each task, and the rows of each task in each split."""

    def __init__(self) -> None:
        self.all = RowMetrics()
        self.tasks: dict[str, RowMetrics] = {}
        self.cells: Counter[tuple[str, str]] = Counter()

    def add(self, row: Row, split: str) -> None:
        """Count a row."""
        self.all.add(row)
        self.tasks.setdefault(row["task"], RowMetrics()).add(row)
        self.cells[row["task"], split] += 1

    def by_rows(self) -> Iterator[tuple[str, RowMetrics]]:
        """Tasks, those with most rows first."""
        yield from sorted(self.tasks.items(), key=lambda task: (-task[1].rows, task[0]))
