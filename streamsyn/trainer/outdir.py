"""OUT of a training: its lock, and train.json, which says what shapes the weights in it."""

import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

import streamsyn
from streamsyn.config.fields import is_operational
from streamsyn.config.fingerprint import differences, lasting
from streamsyn.config.loading import Config, load
from streamsyn.config.train_section import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.io.durable import write_whole
from streamsyn.records import digest
from streamsyn.sink.rundir import DirectoryLock
from streamsyn.trainer.stream.render import read_template

FORMAT = 1
_RECORD = "train.json"
_WRITTEN = ("LATEST", "checkpoints", "model", "weights", "metrics.jsonl", "trained.jsonl", "task_losses.json")
"""What a training writes in OUT."""
_OF_FLEET = ("servers", "tls_ca", "tls_cert")
"""How weights reach the servers."""


class OutDirectory:
    """OUT, locked against other trainings for as long as it is open.

    Raises:
        DirectoryInUse: Another process has it open.
        ConfigError: It cannot be made.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock = DirectoryLock(root)
        except OSError as error:
            raise ConfigError(f"cannot make {root}: {error.strerror}") from error

    def close(self) -> None:
        """Let go of the lock."""
        self._lock.close()

    def claim(self, config: Config, model: str) -> None:
        """Note what this training is, or refuse to go on with another one.

        Raises:
            ConfigError: As `check_shaping` says.
        """
        check_shaping(self.root, config, model)
        saved, fleet = _read(self.root), lasting(config)["fleet"]
        data = {
            "format": FORMAT,
            "created_at": saved["created_at"] if saved else time.time(),
            "config": {
                "run": {"seed": config.run.seed},
                "train": _lasting(config, model),
                "fleet": {
                    key: value for key, value in fleet.items() if key in _OF_FLEET and value is not None
                },
            },
            "shaping": _shaping(config, model),
            "versions": {
                "streamsyn": streamsyn.__version__,
                **{name: version(name) for name in ("torch", "transformers", "accelerate")},
            },
        }
        write_whole(self.root / _RECORD, orjson.dumps(data, option=orjson.OPT_INDENT_2))


def check_ours(root: Path) -> None:
    """Refuse a directory with what a training would replace, but without the record of one.

    Raises:
        ConfigError: It is such a one; the message names what is there.
    """
    if (root / _RECORD).exists():
        return
    there = [name for name in _WRITTEN if os.path.lexists(root / name)]
    if there:
        raise ConfigError(
            f"--out {root} holds {', '.join(there)}, but no {_RECORD} of a training: what is there would be "
            "replaced; use another --out"
        )


def check_shaping(root: Path, config: Config, model: str) -> None:
    """Refuse to go on with a training whose weights were shaped otherwise, or in a run's directory.

    Where no checkpoint is, nothing was shaped yet: a start that failed can be mended.

    Raises:
        ConfigError: Keys that shape the weights differ; the message names each with both values.
    """
    if (root / "run.json").exists():
        raise ConfigError(f"{root} is a run directory; give the training an --out of its own")
    saved = _read(root)
    if saved is None or not _has_checkpoint(root):
        return
    if different := differences(saved["shaping"], _shaping(config, model), _shaping(Config(), model)):
        raise ConfigError(f"{root} holds a training of another kind ({different}); use another --out")


def remembered(root: Path) -> list[tuple[str, Any]]:
    """The sections that a training was begun with, to go on without its configuration file.

    Raises:
        ConfigError: The record of it cannot be read.
    """
    saved = _read(root)
    if saved is None:
        return []
    load(None, saved["config"].items())  # that this version knows each key
    found: list[tuple[str, Any]] = list(saved["config"].items())
    return found


def _shaping(config: Config, model: str) -> dict[str, Any]:
    section = config.train
    template = read_template(section.chat_template)
    fields = TrainSection.model_fields.items()
    keys = {key for key, field in fields if not is_operational(field)}
    return {
        "model": _absolute(model),
        "run.seed": config.run.seed,
        **{f"train.{key}": value for key, value in section.model_dump(mode="json", include=keys).items()},
        "train.chat_template": None if template is None else digest(template).hex(),
    }


def _lasting(config: Config, model: str) -> dict[str, Any]:
    """The section as a later training can go on with it."""
    section = config.train.model_dump(mode="json", exclude_none=True) | {"model": _absolute(model)}
    for key in ("out", "max_steps"):  # of one run only
        section.pop(key, None)
    return section


def _has_checkpoint(root: Path) -> bool:
    """Looks at names alone: to read one takes what only a training needs."""
    names = [path.name for path in (root / "checkpoints").glob("step-*")]
    return (root / "LATEST").exists() or any(not name.endswith(".tmp") for name in names)


def _absolute(model: str) -> str:
    """A directory by its whole path; a name on the hub as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _read(root: Path) -> dict[str, Any] | None:
    path = root / _RECORD
    try:
        data: dict[str, Any] = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if (
        not isinstance(data, dict)
        or data.get("format") != FORMAT
        or not isinstance(data.get("shaping"), dict)
    ):
        raise ConfigError(f"{path} is no record of a training that this streamsyn can go on with")
    return data
