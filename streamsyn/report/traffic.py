"""Tokens and failed attempts of the servers, and when outcomes were written, without idle times."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from streamsyn.report.log_rows import checks_of, number, text

_MAX_NAMES = 48
_OTHER = "(others)"
"""Servers, models and kinds of errors beyond _MAX_NAMES are counted together as _OTHER."""
_MAX_CELLS = 2048
_COLUMNS = 120
_STOP_CELLS = 8
"""A pause is a stop only if it is longer than this many cells, ..."""
_STOP_TIMES = 10
"""... longer than this many times the median pause, ..."""
_STOP_SHARE = 0.05
"""... and longer than this share of the active time."""

MEASURES = ("contexts", "rejects", "tokens", "failed attempts")


@dataclass(slots=True)
class Usage:
    """Tokens of one server or model."""

    answers: int = 0
    prompt: int = 0
    cached: int = 0
    host: int = 0
    storage: int = 0
    completion: int = 0
    thinking: int = 0
    failed: int = 0

    def add(self, row: Any) -> None:
        """Add the tokens of a row or of one of its steps."""
        self.answers += 1
        self.prompt += int(number(row, "prompt_tokens"))
        self.cached += int(number(row, "cached_tokens"))
        self.completion += int(number(row, "completion_tokens"))
        self.thinking += int(number(row, "thinking_tokens"))
        self.add_tiers(row)

    def add_tiers(self, step: Any) -> None:
        """Add the cached tokens of a step that came from host memory and storage."""
        self.host += int(number(step, "cached_host_tokens"))
        self.storage += int(number(step, "cached_storage_tokens"))


class Traffic:
    """Tokens, failed attempts and times of all outcomes."""

    def __init__(self) -> None:
        self.all = Usage()
        self.scoring = Usage()
        self.wasted = 0
        self.servers: dict[str, Usage] = {}
        self.models: dict[str, Usage] = {}
        self.failed: Counter[str] = Counter()
        """Failed attempts by kind of error."""
        self.timeline = Timeline()
        self.newest = 0.0

    def add_context(self, row: dict[str, Any]) -> None:
        """Count a row of contexts."""
        self.all.add(row)
        _usage(self.models, text(row, "model") or "?").add(row)
        for part in row.get("steps") or [row]:
            _usage(self.servers, text(part, "server") or "?").add(part)
            self.all.add_tiers(part)
        if scoring := checks_of(row).get("scoring"):
            self.scoring.add(scoring)
        at, asked_at = self._add_outcome(row), _asked_at(row)
        self.timeline.add(at, "contexts", asked_at=asked_at)
        self.timeline.add(at, "tokens", number(row, "completion_tokens"))

    def add_reject(self, row: dict[str, Any]) -> None:
        """Count a row of rejects."""
        self.timeline.add(self._add_outcome(row), "rejects", asked_at=_asked_at(row))

    def _add_outcome(self, row: dict[str, Any]) -> float:
        """Count what contexts and rejects have in common; return when the row was written (Unix seconds)."""
        self.wasted += int(number(row, "wasted_tokens"))
        at = number(row, "written_at")
        self.newest = max(self.newest, at)
        for attempt in row.get("attempts") or ():
            if error := text(attempt, "error"):
                kind = error.partition(":")[0][:40]
                self.failed[kind if kind in self.failed or len(self.failed) < _MAX_NAMES else _OTHER] += 1
                _usage(self.servers, text(attempt, "server") or "?").failed += 1
                self.timeline.add(number(attempt, "at"), "failed attempts")
        return at


def _asked_at(row: dict[str, Any]) -> float:
    """When the first request of an outcome was sent, in Unix seconds; 0 if it had none."""
    return min((number(attempt, "at") for attempt in row.get("attempts") or ()), default=0.0)


def _usage(usages: dict[str, Usage], name: str) -> Usage:
    return usages.setdefault(name if name in usages or len(usages) < _MAX_NAMES else _OTHER, Usage())


@dataclass(frozen=True, slots=True)
class Column:
    """A stretch of time: its start (Unix seconds), its length, and the sum of each of MEASURES."""

    at: float
    seconds: float
    sums: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Columns without a long pause between them.

    Attributes:
        pause_s: Length of the pause before them, in seconds; 0 for the first stretch.
        was_running: Whether the run went on in that pause: the next outcome was asked for early in it.
        columns: The columns.
    """

    pause_s: float
    was_running: bool
    columns: list[Column]


class Timeline:
    """Sums over time, in cells whose width doubles when there are too many of them."""

    def __init__(self) -> None:
        self._step = 1
        self._cells: dict[int, list[float]] = {}
        self._asked: dict[int, float] = {}
        """When the first request for an outcome of a cell was sent, in Unix seconds."""

    def add(self, at: float, measure: str, amount: float = 1, asked_at: float = 0.0) -> None:
        """Add to a measure at a time in Unix seconds; 0 (not recorded) is ignored.

        Args:
            at: When it happened.
            measure: One of MEASURES.
            amount: How much.
            asked_at: When it was asked for.
        """
        if at <= 0:
            return
        number = int(at) // self._step
        self._cells.setdefault(number, [0.0] * len(MEASURES))[MEASURES.index(measure)] += amount
        self._asked[number] = min(asked_at or at, self._asked.get(number, at))
        while len(self._cells) > _MAX_CELLS:
            self._double()

    def stretches(self) -> list[Stretch]:
        """Return the stretches in order, with about _COLUMNS columns in all."""
        runs = list(self._runs())
        merge = -(-sum(cells[-1] - cells[0] + 1 for _, cells in runs) // _COLUMNS)
        return [
            Stretch(pause * self._step, self._was_running(pause, cells[0]), self._columns(cells, merge))
            for pause, cells in runs
        ]

    def _was_running(self, pause: int, cell: int) -> bool:
        """Whether the first outcome after a pause of `pause` cells was asked for in its first half."""
        return pause > 0 and self._asked[cell] < (cell - pause / 2) * self._step

    def _runs(self) -> Iterator[tuple[int, list[int]]]:
        """Yield the number of empty cells before each stretch, and its cells."""
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
        """Return columns of `merge` cells each, from the first to the last of `cells`."""
        first, last = cells[0], cells[-1]
        sums = [[0.0] * len(MEASURES) for _ in range((last - first) // merge + 1)]
        for cell in cells:
            _add(sums[(cell - first) // merge], self._cells[cell])
        return [
            Column(
                (first + index * merge) * self._step,
                min(merge, last + 1 - first - index * merge) * self._step,
                tuple(column),
            )
            for index, column in enumerate(sums)
        ]

    def _double(self) -> None:
        self._step *= 2
        merged: dict[int, list[float]] = {}
        for cell, sums in self._cells.items():
            _add(merged.setdefault(cell // 2, [0.0] * len(MEASURES)), sums)
        self._cells = merged
        asked: dict[int, float] = {}
        for cell, at in self._asked.items():
            asked[cell // 2] = min(at, asked.get(cell // 2, at))
        self._asked = asked


def _add(into: list[float], sums: list[float]) -> None:
    for index, amount in enumerate(sums):
        into[index] += amount
