"""Draws OUT/training.png from OUT/metrics.jsonl. Needs matplotlib, but not torch."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import accumulate, cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from streamsyn.errors import ConfigError, SinkError
from streamsyn.trainer.metrics.step_log import read_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NEEDLE = re.compile(r"needle_.+_(\d+)")
_LOSSES = {
    "nll_with_context": "held out, with context",
    "nll_without_context": "without context",
    "nll_control": "short chat (control)",
}


@dataclass(slots=True)
class Line:
    """One curve: values over steps or seconds; NaN where a value is missing."""

    at: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, at: float, value: Any) -> None:
        """Add a point."""
        self.at.append(at)
        self.values.append(math.nan if value is None else float(value))


@dataclass(slots=True)
class Curves:
    """The curves of a training.

    They are over steps, except `tokens`, `target_tokens` and `waits`: those are over seconds of training,
    without the time between two processes.

    Attributes:
        waits: The share of each step's time that it waited for its plan; 0 in evaluations and checkpoints.
        skipped: Steps without an update.
        resumed: Seconds at which a process resumed the training.
        losses: Evaluation losses by name. The last value is the mean of all samples; earlier values are
            reconstructed from the measured changes, because samples may have been added since.
        scores: Test scores by name.
        last: The last step's line; empty without steps.
        end: The last line of kind `end`, if no step follows it.
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
    """For each of the losses, the last mean minus its change since the first evaluation."""
    scores: dict[str, Line] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] | None = None

    def add_step(self, line: dict[str, Any], before_s: float) -> None:
        """Add a step of a process that began after `before_s` seconds of training."""
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

    def add_evaluation(self, line: dict[str, Any], by: str = "") -> None:
        """Add an evaluation. Needle scores are averaged over kinds, for each length.

        Args:
            line: The line of metrics.jsonl.
            by: Appended to the names of scores: who answered.
        """
        needles: dict[int, list[float]] = {}
        for key, value in line.items():
            if key in _LOSSES:
                self._add_loss(_LOSSES[key], line["step"], value, line[f"{key}_change"])
            elif found := _NEEDLE.fullmatch(key):
                needles.setdefault(int(found[1]), []).append(value)
            elif key == "longbench":
                self.scores.setdefault(f"LongBench{by}", Line()).add(line["step"], value)
        for length, values in needles.items():
            self.scores.setdefault(f"needles, {length:,} tokens{by}", Line()).add(line["step"], fmean(values))

    def _add_loss(self, name: str, step: int, mean: float, change: float) -> None:
        curve, before = self.losses.setdefault(name, Line()), self._anchors.get(name, 0.0)
        anchor = self._anchors[name] = mean - change
        curve.values = [value - before + anchor for value in curve.values]
        curve.add(step, mean)


def read_curves(out: Path) -> Curves:
    """Read the curves of the training in `out`.

    Raises:
        ConfigError: There are no metrics, or they cannot be read.
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
            case "server_evaluation":
                curves.add_evaluation(line, ", servers")
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
    """For each value, the mean of it and `reach` values on either side, without NaN."""
    sums = list(accumulate((0.0 if math.isnan(one) else one for one in values), initial=0.0))
    counts = list(accumulate((not math.isnan(one) for one in values), initial=0))
    found = []
    for at in range(len(values)):
        begin, end = max(0, at - reach), min(len(values), at + reach + 1)
        count = counts[end] - counts[begin]
        found.append((sums[end] - sums[begin]) / count if count else math.nan)
    return found


PLOT = "training.png"
_BLUE, _ORANGE, _GREEN, _RED, _PURPLE, _GREY = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"),
    "#666666",
)
"""From the palette of Okabe and Ito, which is safe for colour-blind readers."""
_NAMES_A_LINE = 3
_MARKS = ("o", "s", "^", "D", "v", "P")


def draw(out: Path) -> Path:
    """Draw the training in `out`, and return the path of the image.

    Raises:
        ConfigError: matplotlib is not installed, or `out` has no metrics.
        SinkError: The image cannot be written.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = read_curves(out)
    figure = Figure(figsize=(12, 9.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(out, curves), x=0.01, ha="left", fontsize=12)
    rows, heights = _layout(curves)
    panels: dict[str, Axes] = figure.subplot_mosaic(rows, height_ratios=heights)  # type: ignore[arg-type]
    drawn: dict[str, Callable[[Axes, Curves], None]] = {
        "loss": _loss,
        "held_out": _held_out,
        "scores": _scores,
        "rate": _rate,
        "speed": _speed,
        "waits": _waits,
    }
    for name, axes in panels.items():
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        drawn[str(name)](axes, curves)
    panels["waits"].sharex(panels["speed"])
    panels["speed"].tick_params(labelbottom=False)
    path = out / PLOT
    temporary = path.with_name(PLOT + ".new")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    except OSError as error:
        raise SinkError(f"cannot write {path}: {error.strerror}") from error
    return path


def _layout(curves: Curves) -> tuple[list[list[str]], list[float]]:
    """The panels, row by row, and the heights of the rows."""
    right = [name for name, found in (("held_out", curves.losses), ("scores", curves.scores)) if found]
    upper = [["loss"], ["rate"]]
    if right:
        upper = [["loss", right[0]], ["rate", right[-1]]]
    width = len(upper[0])
    heights = [3.0, 2.2 if curves.scores else 1.5, 2.2, 1.0]
    return [*upper, ["speed"] * width, ["waits"] * width], heights


def _title(out: Path, curves: Curves) -> str:
    whole = out.resolve()
    parts = [f"{whole.parent.name}/{whole.name}: {curves.last.get('step', 0):,} steps"]
    if curves.end is not None:
        parts.append(f"{curves.end['examples']:,} samples, {curves.end['tokens']:,} tokens")
        if curves.end["verdict"]:
            parts.append(f"{curves.end['verdict']} (waited {curves.end['wait_share']:.0%} of the time)")
        parts.append(f"ended: {curves.end['why']}")
    return "   |   ".join(parts)


def _loss(axes: "Axes", curves: Curves) -> None:
    steps, losses = curves.loss.at, curves.loss.values
    reach = _reach(curves.loss)
    axes.plot(steps, losses, color=_BLUE, alpha=0.35, linewidth=0.9, label="each step")
    name = f"mean of {2 * reach + 1} steps"
    axes.plot(steps, smoothed(losses, reach), color=_BLUE, linewidth=2, label=name)
    if curves.skipped:
        low = [axes.get_ylim()[0]] * len(curves.skipped)
        axes.plot(curves.skipped, low, "x", color=_RED, clip_on=False, label="skipped: gradient not finite")
    _label(axes, "Training loss", "nats", "step")


def _held_out(axes: "Axes", curves: Curves) -> None:
    _over_steps(axes, curves.losses)
    _label(axes, "Evaluation loss", "nats per target token", "step")


def _scores(axes: "Axes", curves: Curves) -> None:
    _over_steps(axes, curves.scores)
    axes.set_ylim(-0.02, 1.02)
    _label(axes, "Tests", "score", "step")


def _over_steps(axes: "Axes", lines: dict[str, Line]) -> None:
    colours = cycle((_BLUE, _ORANGE, _GREEN, _RED, _PURPLE))
    for (name, line), colour, mark in zip(lines.items(), colours, cycle(_MARKS), strict=False):
        axes.plot(line.at, line.values, color=colour, marker=mark, markersize=4, linewidth=1.6, label=name)


def _rate(axes: "Axes", curves: Curves) -> None:
    axes.plot(curves.rate.at, curves.rate.values, color=_GREY, linewidth=1.6)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _label(axes, "Learning rate", "", "step")


def _speed(axes: "Axes", curves: Curves) -> None:
    from matplotlib.ticker import LogLocator

    for line, name, colour in (
        (curves.tokens, "all tokens", _GREEN),
        (curves.target_tokens, "target tokens", _ORANGE),
    ):
        times = _times(line, curves)
        axes.plot(times, line.values, color=colour, alpha=0.35, linewidth=0.9)
        axes.plot(times, smoothed(line.values, _reach(line)), color=colour, linewidth=2, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: _rate_text(value))
    axes.yaxis.set_minor_formatter("")
    axes.set_xlim(left=0)
    _resumed(axes, curves)
    _label(axes, "Throughput (evaluations and checkpoints left out)", "tokens/s", "")


def _rate_text(value: float) -> str:
    """A rate with k and M for thousands and millions; below one, plain decimals."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _waits(axes: "Axes", curves: Curves) -> None:
    from matplotlib.ticker import PercentFormatter

    times = _times(curves.waits, curves)
    axes.fill_between(times, curves.waits.values, color=_PURPLE, alpha=0.8, linewidth=0)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _resumed(axes, curves)
    _label(axes, "Waiting for samples, share of each step's time", "", f"{_scale(curves)[0]} of training")


def _resumed(axes: "Axes", curves: Curves) -> None:
    named = axes.get_legend_handles_labels()[1]
    for number, second in enumerate(curves.resumed):
        name = "resumed" if named and number == 0 else None
        axes.axvline(second / _scale(curves)[1], color=_GREY, linestyle=":", linewidth=1.2, label=name)


def _scale(curves: Curves) -> tuple[str, float]:
    """The unit of the time axis, and its seconds."""
    seconds = curves.tokens.at[-1] if curves.tokens.at else 0.0
    units = (("hours", 3600.0), ("minutes", 60.0))
    return next((unit for unit in units if seconds > 3 * unit[1]), ("seconds", 1.0))


def _times(line: Line, curves: Curves) -> list[float]:
    return [second / _scale(curves)[1] for second in line.at]


def _reach(line: Line) -> int:
    """Number of steps on either side over which a curve is smoothed."""
    return max(2, len(line.at) // 60)


def _label(axes: Any, title: str, unit: str, below: str) -> None:
    """Set title and labels. Title and legend go above the axes, so that they hide no curve."""
    from matplotlib.ticker import MaxNLocator

    axes.set_ylabel(unit)
    axes.set_xlabel(below)
    if below == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    names = len(axes.get_legend_handles_labels()[1])
    if names:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.01, 1),
            borderaxespad=0,
            ncols=_NAMES_A_LINE,
            frameon=False,
            fontsize=9,
        )
    pad = 6 + 15 * math.ceil(names / _NAMES_A_LINE)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=pad)
