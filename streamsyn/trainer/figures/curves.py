"""What there is to draw of a training: OUT/metrics.jsonl, by what is drawn together."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from streamsyn.errors import ConfigError
from streamsyn.trainer.figures.steplog import read_lines

_NEEDLE = re.compile(r"needle_.+_(\d+)")
_LOSSES = {
    "nll_with_context": "held out, with context",
    "nll_without_context": "without context",
    "nll_control": "short chat (control)",
}


@dataclass(slots=True)
class Line:
    """One curve: values at places; NaN where there is none."""

    at: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, at: float, value: Any) -> None:
        """One more point."""
        self.at.append(at)
        self.values.append(math.nan if value is None else float(value))


@dataclass(slots=True)
class Curves:
    """Curves over steps; `tokens`, `target_tokens` and `waits` over seconds of training.

    Time between two runs of a training is left out.

    Attributes:
        waits: The share of a step's time that it waited for its plan; nothing in evaluations and checkpoints.
        skipped: Steps without an update.
        resumed: Seconds at which a run went on where another one had stopped.
        losses: Of evaluations, by name: the last mean, and before it what it would have been on the same
            samples, as far as changes were measured (samples may have joined).
        scores: Of tests, by name.
        last: The last step's line, or nothing.
        end: The last line that says why a run ended, if no step came after it.
    """

    loss: Line = field(default_factory=Line)
    rate: Line = field(default_factory=Line)
    tokens: Line = field(default_factory=Line)
    target_tokens: Line = field(default_factory=Line)
    waits: Line = field(default_factory=Line)
    skipped: list[int] = field(default_factory=list)
    resumed: list[float] = field(default_factory=list)
    losses: dict[str, Line] = field(default_factory=dict)
    _anchors: dict[str, float] = field(default_factory=dict)
    """For each of them the last mean without its change."""
    scores: dict[str, Line] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] | None = None

    def add_step(self, line: dict[str, Any], before_s: float) -> None:
        """Take up a step, of a run that began after so many seconds of training."""
        step, second = line["step"], before_s + line["wall_s"]
        self.loss.add(step, line["loss"])
        self.rate.add(step, line["rate"])
        self.tokens.add(second, line["tokens_per_s"])
        self.target_tokens.add(second, line["target_tokens_per_s"])
        began, share = max(0.0, second - line["step_s"]), line["wait_s"] / max(line["step_s"], 1e-9)
        for at, value in ((began, 0.0), (began, share), (second, share), (second, 0.0)):
            self.waits.add(at, value)
        if line["skipped"] > self.last.get("skipped", 0):
            self.skipped.append(step)
        self.last, self.end = line, None

    def add_evaluation(self, line: dict[str, Any]) -> None:
        """Take up an evaluation: needles by their length, the mean over their kinds."""
        needles: dict[int, list[float]] = {}
        for key, value in line.items():
            if key in _LOSSES:
                self._add_loss(_LOSSES[key], line["step"], value, line[f"{key}_change"])
            elif found := _NEEDLE.fullmatch(key):
                needles.setdefault(int(found[1]), []).append(value)
            elif key == "longbench":
                self.scores.setdefault("LongBench", Line()).add(line["step"], value)
        for length, values in needles.items():
            self.scores.setdefault(f"needles, {length:,} tokens", Line()).add(line["step"], fmean(values))

    def _add_loss(self, name: str, step: int, mean: float, change: float) -> None:
        curve, before = self.losses.setdefault(name, Line()), self._anchors.get(name, 0.0)
        anchor = self._anchors[name] = mean - change
        curve.values = [value - before + anchor for value in curve.values]
        curve.add(step, mean)


def read_curves(out: Path) -> Curves:
    """The curves of the training in `out`.

    Raises:
        ConfigError: There is none.
    """
    curves, before_s, wall_s = Curves(), 0.0, 0.0
    for line in _lines(out):
        match line.get("kind"):
            case "step":
                if line["wall_s"] < wall_s:
                    before_s += wall_s
                    curves.resumed.append(before_s)
                wall_s = line["wall_s"]
                curves.add_step(line, before_s)
            case "evaluation":
                curves.add_evaluation(line)
            case "end":
                curves.end = line
    if not curves.last and not curves.losses and not curves.scores:
        raise ConfigError(f"{out} has no metrics: nothing has been trained there")
    return curves


def _lines(out: Path) -> Iterator[dict[str, Any]]:
    path = out / "metrics.jsonl"
    try:
        yield from read_lines(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """For each value the mean of itself and `reach` on either side; NaN is passed over."""
    sums = list(accumulate((0.0 if math.isnan(one) else one for one in values), initial=0.0))
    counts = list(accumulate((not math.isnan(one) for one in values), initial=0))
    found = []
    for at in range(len(values)):
        begin, end = max(0, at - reach), min(len(values), at + reach + 1)
        count = counts[end] - counts[begin]
        found.append((sums[end] - sums[begin]) / count if count else math.nan)
    return found
