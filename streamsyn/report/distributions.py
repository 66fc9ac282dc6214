"""Histograms of values that come one by one, in bounded memory, whatever their range.

What was measured of contexts: for all of them, and for each task.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil, floor, isfinite, log10
from typing import Any

from streamsyn.report.log_rows import checks_of, is_number, number, text, words_of

_MOST_CELLS = 4096
_TAIL = 4.0
"""A range so many times as wide as what holds 98 of 100 values is cut: strays would flatten the rest."""


@dataclass(frozen=True, slots=True)
class Bin:
    """One column: so many values from `low` up to, not with, `high`."""

    low: float
    high: float
    count: float


class Histogram:
    """Counts values in cells of one width, which doubles when there are too many cells.

    What it says depends on the values alone, not on their order.

    Args:
        step: Width of a cell at first: 1 for whole numbers, which are then told exactly.
        most_cells: Cells that are kept at most.
    """

    def __init__(self, step: float = 1.0, most_cells: int = _MOST_CELLS) -> None:
        self._first_step = step
        self._step = step
        self._most_cells = most_cells
        self._cells: dict[int, int] = {}
        self.count = 0
        self.lowest = 0.0
        self.highest = 0.0

    def add(self, value: object) -> None:
        """Count a value; what is no finite number is passed over."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            return
        self.lowest = min(self.lowest, value) if self.count else value
        self.highest = max(self.highest, value) if self.count else value
        self.count += 1
        cell = floor(value / self._step + 1e-9)
        self._cells[cell] = self._cells.get(cell, 0) + 1
        while len(self._cells) > self._most_cells:
            self._double()

    def quantile(self, share: float) -> float:
        """The value that `share` of the values do not exceed, to a cell's width; 0 when there are none."""
        wanted, seen = max(1, ceil(share * self.count)), 0
        for cell in sorted(self._cells):
            seen += self._cells[cell]
            if seen >= wanted:
                return min(max(self._value(cell), self.lowest), self.highest)
        return 0.0

    @property
    def median(self) -> float:
        """The value in the middle."""
        return self.quantile(0.5)

    def bins(self, at_most: int = 32, also: tuple[float, ...] = ()) -> list[Bin]:
        """Columns of a round width over the range; strays beyond it are in the first and the last one.

        Args:
            at_most: Columns there are at most, about.
            also: Values that the range is to hold, such as a target.
        """
        if not self.count:
            return []
        low, high = self._range(also)
        width = round_width((high - low) / at_most, self._first_step)
        first, number = floor(low / width + 1e-9), 1
        number = max(1, floor(high / width + 1e-9) - first + 1)
        counts = [0] * number
        for cell, count in self._cells.items():
            place = floor(self._value(cell) / width + 1e-9) - first
            counts[min(max(place, 0), number - 1)] += count
        return [
            Bin((first + place) * width, (first + place + 1) * width, count)
            for place, count in enumerate(counts)
        ]

    def _range(self, also: tuple[float, ...]) -> tuple[float, float]:
        low, high = self.quantile(0.01), self.quantile(0.99)
        spread = _TAIL * max(high - low, self._step)
        low = self.lowest if low - self.lowest <= spread else low
        high = self.highest if self.highest - high <= spread else high
        return min(low, *also, high), max(high, *also, low)

    def _value(self, cell: int) -> float:
        """What a cell stands for: its middle, but for whole numbers."""
        return cell * self._step + (self._step - self._first_step) / 2

    def _double(self) -> None:
        self._step *= 2
        merged: dict[int, int] = {}
        for cell, count in self._cells.items():
            merged[cell // 2] = merged.get(cell // 2, 0) + count
        self._cells = merged


def round_width(width: float, least: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... times a power of ten, at least `least`."""
    width = max(width, least)
    power = 10.0 ** floor(log10(width))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= width * (1 - 1e-9))


def ticks(low: float, high: float, at_most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, a few."""
    if not high > low:
        return [low]
    width = round_width((high - low) / at_most, 1e-9)
    first = ceil(low / width - 1e-9)
    return [first * width for first in accumulate([1] * (floor(high / width + 1e-9) - first), initial=first)]


MOST_TASKS = 24
"""Tasks that are told of one by one."""
OTHER = "(other tasks)"
_NATS, _UNIT = 0.005, 0.005
"""Widths within which gains and scores are not told apart."""


@dataclass(slots=True)
class Scores:
    """Figures of some contexts."""

    contexts: int = 0
    rejects: int = 0
    words: Histogram = field(default_factory=Histogram)
    gain: Histogram = field(default_factory=lambda: Histogram(_NATS))
    positive: int = 0
    """Contexts with a gain above 0."""
    answered: Histogram = field(default_factory=lambda: Histogram(_UNIT))
    closed_book: Histogram = field(default_factory=lambda: Histogram(_UNIT))
    answered_sum: float = 0.0
    closed_book_sum: float = 0.0
    answerable: int = 0
    known: int = 0
    metrics: Counter[str] = field(default_factory=Counter)

    def add(self, row: dict[str, Any], answerable_from: float, known_above: float) -> None:
        """Count a context.

        Args:
            row: Its row in the log.
            answerable_from: Its answer scores at least so much where it is answerable.
            known_above: The answer without it scores more where the model knows it anyway.
        """
        checks = checks_of(row)
        self.contexts += 1
        self.words.add(words_of(row))
        self.gain.add(checks.get("context_gain"))
        self.positive += is_number(checks.get("context_gain")) and checks["context_gain"] > 0
        if is_number(checks.get("answer_score")):
            score = number(checks, "answer_score")
            self.answered.add(score)
            self.answered_sum += score
            self.answerable += score >= answerable_from
            metric = text(checks, "answer_metric")
            self.metrics[metric if metric in ("f1", "rouge_l") else "score"] += 1
        if is_number(checks.get("closed_book_score")):
            score = number(checks, "closed_book_score")
            self.closed_book.add(score)
            self.closed_book_sum += score
            self.known += score > known_above

    @property
    def metric(self) -> str:
        """The name of the score most of them have."""
        names = {"f1": "F1", "rouge_l": "ROUGE-L"}
        return " / ".join(names.get(name, "score") for name, _ in sorted(self.metrics.items()))


class ByTask:
    """Scores by task; those of the tasks that come when there are many already are one."""

    def __init__(self) -> None:
        self._tasks: dict[str, Scores] = {}

    def name(self, task: str) -> str:
        """What a task is counted as."""
        return task if task in self._tasks or len(self._tasks) < MOST_TASKS else OTHER

    def of(self, task: str) -> Scores:
        """The scores of a task."""
        return self._tasks.setdefault(self.name(task), Scores())

    def sorted(self) -> list[tuple[str, Scores]]:
        """By name; the other ones are last."""
        return sorted(self._tasks.items(), key=lambda named: (named[0] == OTHER, named[0]))
