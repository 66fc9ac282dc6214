"""Figures for tensorboard, trackio and wandb, by accelerate, besides what OUT keeps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import structlog

from streamsyn.config.train_section import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.records import digest
from streamsyn.trainer.metrics.record import Track

log = structlog.get_logger()

FOLDER = "tracking"
"""OUT/tracking: where trackers that keep files keep them."""
_PROJECT = "streamsyn"
_PREFIX = {"step": "train", "evaluation": "eval", "end": "end"}
_NO_FIGURES = frozenset({"step", "at"})


def start_tracking(accelerator: Any, section: TrainSection, out: Path, step: int) -> Track | None:
    """Open all trackers; None without any. For rank 0. `end_training` of the accelerator closes them.

    Args:
        accelerator: One that was made with `log_with=section.trackers`.
        section: `train`.
        out: OUT.
        step: Where the training stands; tensorboard hides what an earlier run said of later steps.

    Raises:
        ConfigError: One cannot be opened.
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
        run, name = _one_run(out)
        options = {
            "tensorboard": {"purge_step": step + 1 if step else None},
            "trackio": {"name": name, "resume": "allow"},
            "wandb": {"id": run, "name": name, "resume": "allow", "dir": str(folder)},
        }
        accelerator.init_trackers(_PROJECT, settings, options)
    except Exception as error:  # whatever its package raises, it is not for us to mend
        why = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(f"train.trackers: {', '.join(section.trackers)} cannot be opened: {why}") from error

    working = True

    def track(kind: str, line: Mapping[str, Any], at: int) -> None:
        nonlocal working
        if not working:
            return
        try:
            accelerator.log(numbers(kind, line), step=at)
        except Exception as error:  # noqa: BLE001 - no tracker is worth a training
            working = False
            log.warning("train.tracking_ends", trackers=section.trackers, error=repr(error))

    return track


def _one_run(out: Path) -> tuple[str, str]:
    """An id and a name, the same for all starts of the training in OUT, and for no other one.

    Not for one that was begun anew in its place: wandb drops what is said of steps that it has had.
    """
    whole, record = out.resolve(), out / "train.json"
    began = orjson.loads(record.read_bytes())["created_at"] if record.exists() else None
    run = digest("training", str(whole), str(began)).hex()
    return run, f"{whole.parent.name}-{whole.name}-{run[:6]}"


def numbers(kind: str, line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a line of metrics.jsonl, by names such as `train/loss`; what is nested is left out."""
    return {
        f"{_PREFIX[kind]}/{name}": value
        for name, value in line.items()
        if name not in _NO_FIGURES and isinstance(value, int | float) and not isinstance(value, bool)
    }
