"""Sends the numbers of metrics.jsonl to tensorboard, trackio and wandb, through accelerate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import structlog

from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.records import digest
from streamsyn.trainer.metrics.record import Track

log = structlog.get_logger()

FOLDER = "tracking"
"""OUT/tracking: the files of trackers that write files."""
_PROJECT = "streamsyn"
_PREFIX = {"step": "train", "evaluation": "eval", "end": "end"}
_NOT_FIGURES = frozenset({"step", "at"})


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
