"""Histograms of values that are added one by one, in bounded memory, whatever their range."""

from dataclasses import dataclass
from itertools import accumulate
from math import ceil, floor, log10

from streamsyn.report.log_rows import is_number

_MAX_CELLS = 4096
_TAIL = 4.0
"""Outliers further than this many times the width of the middle 98 % do not widen the range of columns."""


@dataclass(frozen=True, slots=True)
class Bin:
    """One column: `count` values from `low` up to, but not including, `high`."""

    low: float
    high: float
    count: float


class Histogram:
    """Counts values in cells of one width, which doubles when there are too many cells.

    The result depends on the values only, not on their order.

    Args:
        step: Initial width of a cell; with 1, whole numbers are counted exactly.
        max_cells: Maximum number of cells.
    """

    def __init__(self, step: float = 1.0, max_cells: int = _MAX_CELLS) -> None:
        self._first_step = step
        self._step = step
        self._max_cells = max_cells
        self._cells: dict[int, int] = {}
        self.count = 0
        self.lowest = 0.0
        self.highest = 0.0

    def add(self, value: object) -> None:
        """Count a value; anything but a finite number is ignored."""
        if not is_number(value):
            return
        self.lowest = min(self.lowest, value) if self.count else value
        self.highest = max(self.highest, value) if self.count else value
        self.count += 1
        cell = floor(value / self._step + 1e-9)
        self._cells[cell] = self._cells.get(cell, 0) + 1
        while len(self._cells) > self._max_cells:
            self._double()

    def quantile(self, share: float) -> float:
        """Return a quantile, exact to a cell's width; 0 if there are no values."""
        wanted, seen = max(1, ceil(share * self.count)), 0
        for cell in sorted(self._cells):
            seen += self._cells[cell]
            if seen >= wanted:
                return min(max(self._value(cell), self.lowest), self.highest)
        return 0.0

    @property
    def median(self) -> float:
        """The median; 0 if there are no values."""
        return self.quantile(0.5)

    def bins(self, at_most: int = 32, also: tuple[float, ...] = ()) -> list[Bin]:
        """Return columns of a round width; outliers are counted in the first and the last one.

        Args:
            at_most: Approximate maximum number of columns.
            also: Values that the range must include, such as a target.
        """
        if not self.count:
            return []
        low, high = self._range(also)
        width = round_width((high - low) / at_most, self._first_step)
        first = floor(low / width + 1e-9)
        n_bins = max(1, floor(high / width + 1e-9) - first + 1)
        counts = [0] * n_bins
        for cell, count in self._cells.items():
            index = floor(self._value(cell) / width + 1e-9) - first
            counts[min(max(index, 0), n_bins - 1)] += count
        return [
            Bin((first + index) * width, (first + index + 1) * width, count)
            for index, count in enumerate(counts)
        ]

    def _range(self, also: tuple[float, ...]) -> tuple[float, float]:
        low, high = self.quantile(0.01), self.quantile(0.99)
        spread = _TAIL * max(high - low, self._step)
        low = self.lowest if low - self.lowest <= spread else low
        high = self.highest if self.highest - high <= spread else high
        return min(low, *also, high), max(high, *also, low)

    def _value(self, cell: int) -> float:
        """Return the middle of a cell; for whole numbers, the middle of the whole numbers in it."""
        return cell * self._step + (self._step - self._first_step) / 2

    def _double(self) -> None:
        self._step *= 2
        merged: dict[int, int] = {}
        for cell, count in self._cells.items():
            merged[cell // 2] = merged.get(cell // 2, 0) + count
        self._cells = merged


def round_width(width: float, least: float) -> float:
    """Return the smallest of ..., 1, 2, 5, 10, 20, ... that is at least `width` and `least`."""
    width = max(width, least)
    power = 10.0 ** floor(log10(width))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= width * (1 - 1e-9))


def ticks(low: float, high: float, at_most: int = 5) -> list[float]:
    """Return a few round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    width = round_width((high - low) / at_most, 1e-9)
    first = ceil(low / width - 1e-9)
    return [first * width for first in accumulate([1] * (floor(high / width + 1e-9) - first), initial=first)]
