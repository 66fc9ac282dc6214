"""Distributions of values in bounded memory, and small charts of them as inline SVG.

Horizontal positions are in per cent, so text keeps its size at any width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from math import ceil, floor, log10

from markupsafe import Markup

from streamsyn.pipeline.progress import duration
from streamsyn.report.log_rows import is_number
from streamsyn.report.traffic import MEASURES, Stretch

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


_TOP, _BASE, _HEIGHT = 16, 108, 126
_LINES_HEIGHT = 72
_NARROW = 14.0
"""Labels nearer than this to an edge (in per cent) are aligned to the edge."""
_BREAK, _BREAKS = 4.0, 30.0
"""Width of a stop, and maximum width of all stops, in per cent."""
_LABEL_ROOM = 45.0
"""Least distance of two labels of pauses in per cent, so that they do not collide on a phone."""


def number_text(value: float) -> str:
    """Return a number as text, with fewer decimals the larger it is."""
    if value == 0 or abs(value) >= 100 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}"


def histogram(
    values: Histogram, title: str, unit: str, markers: Sequence[tuple[float, str]] = (), at_most: int = 32
) -> Markup:
    """Return a histogram; `markers` are values with a line and a label, such as a target."""
    description = (
        f"{values.count:,} values from {number_text(values.lowest)} to {number_text(values.highest)} {unit}, "
        f"median {number_text(values.median)}"
    )
    return columns(
        values.bins(at_most, tuple(value for value, _ in markers)), title, unit, description, markers
    )


def columns(
    bins: Sequence[Bin], title: str, unit: str, description: str, markers: Sequence[tuple[float, str]] = ()
) -> Markup:
    """Return a chart of columns of one width; empty if there are none."""
    if not bins:
        return Markup()
    low, high, most = bins[0].low, bins[-1].high, max(one.count for one in bins)
    width = 100 / len(bins)
    body = []
    for index, one in enumerate(bins):
        tall = (_BASE - _TOP) * one.count / most
        tip = f"{number_text(one.low)} to {number_text(one.high)} {unit}: {one.count:,.0f}"
        body.append(_rect(index * width + width * 0.06, width * 0.88, _BASE - tall, tall, "col", tip))
    body.append(_line(0, 100, _BASE, _BASE, "axis"))
    body += [
        _text(_x(value, low, high), _HEIGHT - 4, number_text(value), "tick") for value in ticks(low, high, 4)
    ]
    labelled: list[float] = []
    for value, label in markers:
        x = _x(value, low, high)
        body.append(_line(x, x, _TOP - 2, _BASE, "mark"))
        if all(abs(x - other) >= _LABEL_ROOM for other in labelled):
            body.append(_text(x, _TOP - 6, label, "marked"))
            labelled.append(x)
    return _svg(_HEIGHT, title, description, body)


def box(values: Histogram, low: float, high: float, title: str, style: str = "", line: float = 0.0) -> Markup:
    """Return a box plot: the median, a box over the middle 50 %, and whiskers over the middle 90 %."""
    body = [_line(x, x, 0, 22, "zero") for x in [_x(line, low, high)]]
    if values.count:
        p5, p25, p50, p75, p95 = (
            _x(values.quantile(share), low, high) for share in (0.05, 0.25, 0.5, 0.75, 0.95)
        )
        body.append(_line(p5, p95, 11, 11, "whisker"))
        body.append(_rect(p25, max(0.4, p75 - p25), 5, 12, f"box {style}"))
        body.append(_line(p50, p50, 3, 19, "median"))
    description = (
        f"median {values.median:.2f}, middle half {values.quantile(0.25):.2f} to {values.quantile(0.75):.2f}"
    )
    return _svg(22, title, description, body)


def axis(low: float, high: float) -> Markup:
    """Return the scale below box plots."""
    body = [_line(0, 100, 1, 1, "axis")]
    body += [_text(_x(value, low, high), 16, number_text(value), "tick") for value in ticks(low, high, 4)]
    return _svg(20, "scale", f"from {number_text(low)} to {number_text(high)}", body)


def bar(value: float, most: float, title: str, style: str = "") -> Markup:
    """Return a bar whose length is its share of `most`."""
    width = 100 * value / most if most else 0.0
    return _svg(14, title, "", [_rect(0, max(width, 0.4 if value else 0.0), 1, 12, f"col {style}")])


@dataclass(frozen=True, slots=True)
class _Placed:
    """A column of a time chart with its position and width in per cent."""

    x: float
    width: float
    at: float
    rate: float


@dataclass(frozen=True, slots=True)
class _Pause:
    """A band between columns, with its position and width in per cent."""

    x: float
    width: float
    seconds: float
    label: str


def over_time(stretches: Sequence[Stretch], measure: str, per_s: float, title: str) -> Markup:
    """Return a chart of a measure over time, with pauses as narrow bands. The rate is per `per_s` seconds."""
    columns, pauses = _layout(stretches, MEASURES.index(measure), per_s)
    most = max((column.rate for column in columns), default=0.0)
    if not most:
        return Markup()
    body = [_rect(pause.x, pause.width, 0, 64, "stop", pause.label) for pause in pauses]
    for column in columns:
        tall = 56 * column.rate / most
        tip = f"{clock(column.at)}: {number_text(column.rate)}"
        body.append(_rect(column.x, column.width * 0.94, 64 - tall, tall, "col", tip))
    body.append(_line(0, 100, 64, 64, "axis"))
    return _svg(66, title, f"at most {number_text(most)}", body)


def highest_rate(stretches: Sequence[Stretch], measure: str, per_s: float) -> str:
    """Return the highest rate of a time chart."""
    columns, _ = _layout(stretches, MEASURES.index(measure), per_s)
    return number_text(max((column.rate for column in columns), default=0.0))


def time_axis(stretches: Sequence[Stretch]) -> Markup:
    """Return the time axis: start, end, and the longest pauses, as far as their labels have room."""
    columns, pauses = _layout(stretches, 0, 1)
    if not columns:
        return Markup()
    body = [_text(0, 14, clock(columns[0].at), "tick")]
    last = stretches[-1].columns[-1]
    body.append(_text(100, 14, clock(last.at + last.seconds), "tick"))
    labelled: list[_Pause] = []
    for pause in sorted(pauses, key=lambda pause: -pause.seconds):
        if all(abs(pause.x - other.x) >= _LABEL_ROOM for other in labelled):
            labelled.append(pause)
    body += [_text(pause.x + pause.width / 2, 30, pause.label, "tick") for pause in labelled]
    return _svg(
        36 if pauses else 20, "time", f"from {clock(columns[0].at)} to {clock(last.at + last.seconds)}", body
    )


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart: a value for each time, None where it is unknown, and the CSS class of its stroke."""

    name: str
    values: Sequence[float | None]
    style: str


def lines(at: Sequence[float], drawn: Sequence[Line], title: str, window: tuple[float, float]) -> Markup:
    """Return a chart of values over seconds, with a band behind `window`; empty without values."""
    known = [value for line in drawn for value in line.values if value is not None]
    if not known or len(at) < 2:
        return Markup()
    first, last, most = at[0], at[-1], max(known) or 1.0
    begin, end = (_x(second, first, last) for second in window)
    body = [_rect(begin, end - begin, 0, _LINES_HEIGHT, "window")]
    body += [_polyline(at, line, most) for line in drawn]
    body.append(_line(0, 100, _LINES_HEIGHT, _LINES_HEIGHT, "axis"))
    return _svg(_LINES_HEIGHT + 2, title, f"from 0 to {number_text(most)}", body)


def seconds_axis(at: Sequence[float]) -> Markup:
    """Return the time axis below charts of lines."""
    if len(at) < 2:
        return Markup()
    body = [
        _text(_x(value, at[0], at[-1]), 14, f"{number_text(value)} s", "tick")
        for value in ticks(at[0], at[-1], 4)
    ]
    return _svg(20, "seconds", f"from {number_text(at[0])} to {number_text(at[-1])}", body)


def _polyline(at: Sequence[float], line: Line, most: float) -> Markup:
    """Return a line in coordinates of its own, stretched to the chart's width; unknown values are gaps."""
    steps, is_drawing = [], False
    for second, value in zip(at, line.values, strict=True):
        if value is not None:
            x, y = _x(second, at[0], at[-1]), _LINES_HEIGHT - (_LINES_HEIGHT - 2) * value / most
            steps.append(f"{'L' if is_drawing else 'M'}{x:.2f} {y:.2f}")
        is_drawing = value is not None
    return Markup(
        '<svg width="100%" height="{0}" viewBox="0 0 100 {0}" preserveAspectRatio="none">'
        '<path d="{1}" class="line {2}" vector-effect="non-scaling-stroke"><title>{3}</title></path></svg>'
    ).format(_LINES_HEIGHT, "".join(steps), line.style, line.name)


def clock(at: float) -> str:
    """Return a Unix time as date and time in UTC."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _layout(stretches: Sequence[Stretch], measure: int, per_s: float) -> tuple[list[_Placed], list[_Pause]]:
    """Return columns and pauses with their places."""
    gap = min(_BREAK, _BREAKS / max(1, len(stretches) - 1)) if len(stretches) > 1 else 0.0
    active = sum(column.seconds for stretch in stretches for column in stretch.columns)
    scale = (100 - gap * max(0, len(stretches) - 1)) / max(active, 1e-9)
    columns: list[_Placed] = []
    pauses: list[_Pause] = []
    x = 0.0
    for index, stretch in enumerate(stretches):
        if index:
            kind = "no outcomes for" if stretch.was_running else "stopped for"
            label = f"{kind} {duration(stretch.pause_s)}"
            pauses.append(_Pause(x + 0.15 * gap, 0.7 * gap, stretch.pause_s, label))
            x += gap
        for column in stretch.columns:
            width = column.seconds * scale
            rate = column.sums[measure] * per_s / column.seconds
            columns.append(_Placed(x, width, column.at, rate))
            x += width
    return columns, pauses


def _x(value: float, low: float, high: float) -> float:
    return 100 * min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 50.0


def _svg(height: int, title: str, description: str, body: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="plot" width="100%" height="{}" role="img" aria-label="{}">'
        "<title>{}</title><desc>{}</desc>{}</svg>"
    ).format(height, title, title, description, Markup("").join(body))


def _rect(x: float, width: float, y: float, height: float, style: str, tip: str = "") -> Markup:
    inside = Markup("<title>{}</title>").format(tip) if tip else Markup()
    return Markup('<rect x="{:.2f}%" width="{:.2f}%" y="{:.1f}" height="{:.1f}" class="{}">{}</rect>').format(
        x, width, y, height, style, inside
    )


def _line(x1: float, x2: float, y1: float, y2: float, style: str) -> Markup:
    return Markup('<line x1="{:.2f}%" x2="{:.2f}%" y1="{:.1f}" y2="{:.1f}" class="{}"/>').format(
        x1, x2, y1, y2, style
    )


def _text(x: float, y: float, label: str, style: str) -> Markup:
    anchor = "start" if x < _NARROW else "end" if x > 100 - _NARROW else "middle"
    return Markup('<text x="{:.2f}%" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(
        x, y, anchor, style, label
    )
