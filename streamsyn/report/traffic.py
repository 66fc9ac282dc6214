"""What happened when: sums over stretches of time, with the time left out in which a run was stopped.

What the servers did: tokens, failed tries, and when.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from streamsyn.report.log_rows import checks_of, number, text

_MOST_CELLS = 2048
_COLUMNS = 120
_STOP_CELLS = 8
"""A pause is a stop only if it is longer than so many cells, ..."""
_STOP_TIMES = 10
"""... and so many times as long as pauses are as a rule, ..."""
_STOP_SHARE = 0.05
"""... and than this share of the time in which something happened."""

MEASURES = ("contexts", "rejects", "tokens", "failed tries")


@dataclass(frozen=True, slots=True)
class Column:
    """A stretch of time: when it began, in Unix seconds, how long it was, and the sum of each measure."""

    at: float
    seconds: float
    sums: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Columns without a stop between them, and how long the stop before them was in seconds."""

    stopped_s: float
    columns: list[Column]


class Timeline:
    """Sums by time, in cells whose width doubles when there are too many of them."""

    def __init__(self) -> None:
        self._step = 1
        self._cells: dict[int, list[float]] = {}

    def add(self, at: float, measure: str, amount: float = 1) -> None:
        """Add to a measure at a time, in Unix seconds; a time that is none (0) is passed over."""
        if at <= 0:
            return
        cell = self._cells.setdefault(int(at) // self._step, [0.0] * len(MEASURES))
        cell[MEASURES.index(measure)] += amount
        while len(self._cells) > _MOST_CELLS:
            self._double()

    def stretches(self) -> list[Stretch]:
        """All that happened, in order, in about as many columns as can be told apart."""
        runs = list(self._runs())
        merge = -(-sum(cells[-1] - cells[0] + 1 for _, cells in runs) // _COLUMNS)
        return [Stretch(stop * self._step, self._columns(cells, merge)) for stop, cells in runs]

    def _runs(self) -> Iterator[tuple[int, list[int]]]:
        """The cells of each stretch, and how many empty ones were before it."""
        if not self._cells:
            return
        cells = sorted(self._cells)
        pauses = [later - earlier for earlier, later in pairwise(cells)]
        usual = median(pauses) if pauses else 1
        active = sum(pause for pause in pauses if pause <= _STOP_TIMES * usual)
        stop = max(_STOP_CELLS, _STOP_TIMES * usual, _STOP_SHARE * active)
        run, stopped = [cells[0]], 0
        for cell, pause in zip(cells[1:], pauses, strict=True):
            if pause > stop:
                yield stopped, run
                run, stopped = [], pause - 1
            run.append(cell)
        yield stopped, run

    def _columns(self, cells: list[int], merge: int) -> list[Column]:
        """Columns of `merge` cells from the first of `cells` to the last one."""
        first, last = cells[0], cells[-1]
        sums = [[0.0] * len(MEASURES) for _ in range((last - first) // merge + 1)]
        for cell in cells:
            _add(sums[(cell - first) // merge], self._cells[cell])
        return [
            Column(
                (first + place * merge) * self._step,
                min(merge, last + 1 - first - place * merge) * self._step,
                tuple(column),
            )
            for place, column in enumerate(sums)
        ]

    def _double(self) -> None:
        self._step *= 2
        merged: dict[int, list[float]] = {}
        for cell, sums in self._cells.items():
            _add(merged.setdefault(cell // 2, [0.0] * len(MEASURES)), sums)
        self._cells = merged


def _add(into: list[float], sums: list[float]) -> None:
    for place, amount in enumerate(sums):
        into[place] += amount


_MOST_NAMES = 48
OTHER = "(others)"


@dataclass(slots=True)
class Usage:
    """Tokens of one server or model."""

    answers: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    failed: int = 0

    def add(self, row: Any) -> None:
        """Count what a row or a step of it used."""
        self.answers += 1
        self.prompt += int(number(row, "prompt_tokens"))
        self.cached += int(number(row, "cached_tokens"))
        self.completion += int(number(row, "completion_tokens"))


class Traffic:
    """Sums over all outcomes."""

    def __init__(self) -> None:
        self.all = Usage()
        self.scoring = Usage()
        self.wasted = 0
        self.servers: dict[str, Usage] = {}
        self.models: dict[str, Usage] = {}
        self.failed: Counter[str] = Counter()
        """Failed tries by kind."""
        self.timeline = Timeline()
        self.newest = 0.0

    def context(self, row: dict[str, Any]) -> None:
        """Count a row of contexts."""
        self.all.add(row)
        _of(self.models, text(row, "model") or "?").add(row)
        for part in row.get("steps") or [row]:
            _of(self.servers, text(part, "server") or "?").add(part)
        if scoring := checks_of(row).get("scoring"):
            self.scoring.add(scoring)
        at = self._outcome(row)
        self.timeline.add(at, "contexts")
        self.timeline.add(at, "tokens", number(row, "completion_tokens"))

    def reject(self, row: dict[str, Any]) -> None:
        """Count a row of rejects."""
        self.timeline.add(self._outcome(row), "rejects")

    def _outcome(self, row: dict[str, Any]) -> float:
        """What contexts and rejects have both; when it was written."""
        self.wasted += int(number(row, "wasted_tokens"))
        at = number(row, "written_at")
        self.newest = max(self.newest, at)
        for attempt in row.get("attempts") or ():
            if error := text(attempt, "error"):
                kind = error.partition(":")[0][:40]
                self.failed[kind if kind in self.failed or len(self.failed) < _MOST_NAMES else OTHER] += 1
                _of(self.servers, text(attempt, "server") or "?").failed += 1
                self.timeline.add(number(attempt, "at"), "failed tries")
        return at


def _of(usages: dict[str, Usage], name: str) -> Usage:
    return usages.setdefault(name if name in usages or len(usages) < _MOST_NAMES else OTHER, Usage())
