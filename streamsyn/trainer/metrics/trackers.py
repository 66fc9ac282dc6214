"""Where the metrics of a training go besides OUT: to trackers, and to the daemon whose samples it reads.

tensorboard, trackio and wandb get the numbers of metrics.jsonl through accelerate. The daemon gets the loss,
and which rows the training has done with, and keeps both under a named consumer: its page draws the loss, and
retention keeps the rows that the training may still need. The report is made in the background; a daemon that
cannot be reached misses some.
"""

import re
from collections.abc import Callable, Mapping
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any, Final

import orjson
import structlog

from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.records import digest
from streamsyn.trainer.metrics.record import Track
from streamsyn.trainer.sources.run_samples import DaemonSamples

log = structlog.get_logger()

FOLDER = "tracking"
"""OUT/tracking: the files of trackers that write files."""
_PROJECT = "streamsyn"
_PREFIX = {
    "step": "train",
    "evaluation": "eval",
    "server_evaluation": "eval_servers",
    "checkpoint": "checkpoint",
    "publication": "publication",
    "end": "end",
}
_NOT_FIGURES = frozenset({"step", "at", "at_step"})
_REPORTED: Final = ("step", "loss", "rate", "grad_norm", "examples", "tokens")
_NONE_DONE: Final = -1


def start_tracking(accelerator: Any, section: TrainSection, out: Path, step: int) -> Track | None:
    """Open the trackers of `train.trackers`, on rank 0. The accelerator's `end_training` closes them.

    Args:
        accelerator: Created with `log_with=section.trackers`.
        section: `train`.
        out: OUT.
        step: The step where the training resumes; tensorboard hides later steps of earlier processes.

    Returns:
        The function that sends metrics to them; None without trackers. If it fails once, it logs that and
        sends nothing more.

    Raises:
        ConfigError: A tracker cannot be opened.
    """
    if not section.trackers:
        return None
    folder = out / FOLDER
    settings = {
        key: value
        for key, value in section.model_dump().items()
        if isinstance(value, bool | int | float | str)
    }
    try:
        folder.mkdir(exist_ok=True)
        run, name = _run_identity(out)
        options = {
            "tensorboard": {"purge_step": step + 1 if step else None},
            "trackio": {"name": name, "resume": "allow"},
            "wandb": {"id": run, "name": name, "resume": "allow", "dir": str(folder)},
        }
        accelerator.init_trackers(_PROJECT, settings, options)
    except Exception as error:  # each tracker raises its own kinds
        why = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(f"train.trackers: {', '.join(section.trackers)} cannot be opened: {why}") from error

    working = True

    def track(kind: str, line: Mapping[str, Any], at: int) -> None:
        nonlocal working
        if not working:
            return
        try:
            accelerator.log(numbers(kind, line), step=at)
        except Exception as error:  # noqa: BLE001 - a tracker must not end a training
            working = False
            log.warning("train.tracking_ends", trackers=section.trackers, error=repr(error))

    return track


def _run_identity(out: Path) -> tuple[str, str]:
    """The id and name of the training in OUT, the same for all its processes.

    A training that replaced an earlier one in OUT has a different id: wandb drops steps that it has seen.
    """
    whole, record = out.resolve(), out / "train.json"
    created = orjson.loads(record.read_bytes())["created_at"] if record.exists() else None
    run = digest("training", str(whole), str(created)).hex()
    return run, f"{whole.parent.name}-{whole.name}-{run[:6]}"


def numbers(kind: str, line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a line of metrics.jsonl, by names such as `train/loss`, without nested fields."""
    return {
        f"{_PREFIX[kind]}/{name}": value
        for name, value in line.items()
        if name not in _NOT_FIGURES and isinstance(value, int | float) and not isinstance(value, bool)
    }


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
    earlier = chain(state.get("drawn", ()), *state.get("rows", ()))  # of positions of earlier versions
    keys = chain(state["held"], state["held_out"], earlier)
    needed: list[int] = [seq for name, epoch, seq in keys if name == source and epoch == stream["epoch"]]
    return max(_NONE_DONE, min([int(stream["next"]) - 1, *needed]) - 1)


def _newest_checkpoint(out: Path) -> int:
    """The step of the newest checkpoint; 0 before the first."""
    try:
        return int((out / "LATEST").read_text().strip().removeprefix("step-"))
    except (OSError, ValueError):
        return 0
