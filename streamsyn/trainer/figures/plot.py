"""A training as a picture: OUT/training.png, drawn from OUT/metrics.jsonl. Needs matplotlib, not torch."""

import math
from collections.abc import Callable
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamsyn.errors import ConfigError, SinkError
from streamsyn.trainer.figures.curves import Curves, Line, read_curves, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT = "training.png"
_BLUE, _ORANGE, _GREEN, _RED, _PURPLE, _GREY = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"),
    "#666666",
)
"""Of Okabe and Ito's palette, which people of any colour vision tell apart."""
_NAMES_A_LINE = 3
_MARKS = ("o", "s", "^", "D", "v", "P")


def draw(out: Path) -> Path:
    """Draw the training in `out`; where the picture lies.

    Raises:
        ConfigError: matplotlib is missing, or nothing has been trained in `out`.
        SinkError: The picture cannot be written.
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
    aside = path.with_name(PLOT + ".new")
    try:
        figure.savefig(aside, format="png")
        aside.replace(path)
    except OSError as error:
        raise SinkError(f"cannot write {path}: {error.strerror}") from error
    return path


def _layout(curves: Curves) -> tuple[list[list[str]], list[float]]:
    """Which panels there are, row by row, and the heights of the rows."""
    right = [name for name, there in (("held_out", curves.losses), ("scores", curves.scores)) if there]
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
            parts.append(f"{curves.end['verdict']} (waited {curves.end['wait_share']:.0%} of its time)")
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
    _name(axes, "Training loss", "nats", "step")


def _held_out(axes: "Axes", curves: Curves) -> None:
    _over_steps(axes, curves.losses)
    _name(axes, "Evaluation loss", "nats a target token", "step")


def _scores(axes: "Axes", curves: Curves) -> None:
    _over_steps(axes, curves.scores)
    axes.set_ylim(-0.02, 1.02)
    _name(axes, "Tests", "score", "step")


def _over_steps(axes: "Axes", lines: dict[str, Line]) -> None:
    colours = cycle((_BLUE, _ORANGE, _GREEN, _RED, _PURPLE))
    for (name, line), colour, mark in zip(lines.items(), colours, cycle(_MARKS), strict=False):
        axes.plot(line.at, line.values, color=colour, marker=mark, markersize=4, linewidth=1.6, label=name)


def _rate(axes: "Axes", curves: Curves) -> None:
    axes.plot(curves.rate.at, curves.rate.values, color=_GREY, linewidth=1.6)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _name(axes, "Learning rate", "", "step")


def _speed(axes: "Axes", curves: Curves) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator

    for line, name, colour in (
        (curves.tokens, "all tokens", _GREEN),
        (curves.target_tokens, "target tokens", _ORANGE),
    ):
        times = _times(line, curves)
        axes.plot(times, line.values, color=colour, alpha=0.35, linewidth=0.9)
        axes.plot(times, smoothed(line.values, _reach(line)), color=colour, linewidth=2, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_minor_formatter("")
    axes.set_xlim(left=0)
    _resumed(axes, curves)
    _name(axes, "Throughput (evaluations and checkpoints left out)", "tokens/s", "")


def _waits(axes: "Axes", curves: Curves) -> None:
    from matplotlib.ticker import PercentFormatter

    times = _times(curves.waits, curves)
    axes.fill_between(times, curves.waits.values, color=_PURPLE, alpha=0.8, linewidth=0)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _resumed(axes, curves)
    _name(axes, "Waiting for samples, share of each step's time", "", f"{_scale(curves)[0]} of training")


def _resumed(axes: "Axes", curves: Curves) -> None:
    named = axes.get_legend_handles_labels()[1]
    for number, second in enumerate(curves.resumed):
        name = "resumed" if named and number == 0 else None
        axes.axvline(second / _scale(curves)[1], color=_GREY, linestyle=":", linewidth=1.2, label=name)


def _scale(curves: Curves) -> tuple[str, float]:
    """The unit of time, and its seconds."""
    seconds = curves.tokens.at[-1] if curves.tokens.at else 0.0
    units = (("hours", 3600.0), ("minutes", 60.0))
    return next((unit for unit in units if seconds > 3 * unit[1]), ("seconds", 1.0))


def _times(line: Line, curves: Curves) -> list[float]:
    return [second / _scale(curves)[1] for second in line.at]


def _reach(line: Line) -> int:
    """Steps on either side over which a curve is smoothed."""
    return max(2, len(line.at) // 60)


def _name(axes: Any, title: str, unit: str, below: str) -> None:
    """Title and legend stand above the curves, so that they hide none."""
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
