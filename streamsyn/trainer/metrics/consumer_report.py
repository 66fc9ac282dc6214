"""Reports a training to the daemon whose samples it reads: which rows it has done with, and its loss.

The daemon keeps both under a named consumer: its page draws the loss, and retention keeps the rows that the
training may still need. The report is made in the background; a daemon that cannot be reached misses some.
"""

import re
from collections.abc import Callable, Mapping
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any, Final

from streamsyn.records import digest
from streamsyn.trainer.metrics.record import Track
from streamsyn.trainer.sources.run_samples import DaemonSamples

_REPORTED: Final = ("step", "loss", "rate", "grad_norm", "examples", "tokens")
_NONE_DONE: Final = -1


def consumer_report(
    samples: DaemonSamples,
    out: Path,
    epochs: int,
    position: Callable[[], dict[str, Any] | None],
    also: Track | None,
) -> Track:
    """Return the function that reports the metrics of a training.

    Args:
        samples: The samples that it is trained on.
        out: OUT, which gives the consumer its name; LATEST in it names the newest checkpoint.
        epochs: Passes over the stream.
        position: Returns the position in the stream: that before a step when the step is reported, which is
            never too far, and that of the last checkpoint at the end.
        also: Receives the metrics first.
    """
    name = consumer_name(out)
    done_after: dict[int, int] = {}
    """The last row that is not needed after a step, for the steps since the newest checkpoint."""
    latest: dict[str, float] = {}
    """The newest of each metric: a report replaces the one before, and not every line has a loss."""

    def track(kind: str, line: Mapping[str, Any], at: int) -> None:
        if also is not None:
            also(kind, line, at)
        if kind in ("step", "end"):
            done_after[at] = last_done(position(), epochs)
        saved = _newest_checkpoint(out)
        for step in [step for step in done_after if step < saved]:
            del done_after[step]
        found = {key: line[key] for key in _REPORTED if isinstance(line.get(key), int | float)}
        latest.update({key: value for key, value in found.items() if isfinite(value)})
        samples.report(name, done_after.get(saved, _NONE_DONE), latest, wait=kind == "end")

    return track


def consumer_name(out: Path) -> str:
    """The name of a training's consumer: the same for all its processes, and valid as an id."""
    whole = out.resolve()
    readable = re.sub(r"[^a-z0-9._-]+", "-", whole.name.lower()).strip("._-")[:40]
    return f"training-{readable}-{digest('training', str(whole)).hex()[:6]}".replace("--", "-")


def last_done(state: Mapping[str, Any] | None, epochs: int) -> int:
    """The seq up to which a training that resumes from a position needs no row; -1 for none.

    It needs the rows that it holds, those that are held out, and the last one that it took, whose content it
    compares.
    """
    if state is None:
        return _NONE_DONE
    source, stream = state["feed"]["source"], state["feed"]["stream"]
    if stream["epoch"] + 1 < epochs:
        return _NONE_DONE  # a later pass reads all of them again
    keys = chain(state["held"], state["drawn"], state["held_out"], *state["rows"])
    needed: list[int] = [seq for name, epoch, seq in keys if name == source and epoch == stream["epoch"]]
    return max(_NONE_DONE, min([int(stream["next"]) - 1, *needed]) - 1)


def _newest_checkpoint(out: Path) -> int:
    """The step of the newest checkpoint; 0 before the first."""
    try:
        return int((out / "LATEST").read_text().strip().removeprefix("step-"))
    except (OSError, ValueError):
        return 0
