"""OUT of a training: its lock, and train.json, the record of what shapes the weights in it."""

import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zlib import crc32

import orjson

import streamsyn
from streamsyn.config.command_sections import TrainSection
from streamsyn.config.fields import is_operational
from streamsyn.config.fingerprint import differences, with_absolute_paths
from streamsyn.config.loading import Config, load
from streamsyn.errors import ConfigError
from streamsyn.io.durable import make_folder, write_whole
from streamsyn.plain_text import without_userinfo_within
from streamsyn.records import digest
from streamsyn.sink.rundir import DirectoryLock
from streamsyn.trainer.stream.render import read_template

_FORMAT = 1
_RECORD = "train.json"
_WRITTEN = ("LATEST", "checkpoints", "model", "weights", "metrics.jsonl", "trained.jsonl", "task_losses.json")
"""What a training writes to OUT."""
_OF_FLEET = ("servers", "tls_ca", "tls_cert")
"""Keys of the section `fleet` that are recorded: how weights reach the servers."""


class OutDirectory:
    """OUT, locked against other trainings until `close`.

    Raises:
        DirectoryInUse: A different process has it open.
        ConfigError: The directory cannot be created.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            make_folder(root)
            self._lock = DirectoryLock(root)
        except OSError as error:
            raise ConfigError(f"--out: cannot create {root}: {error.strerror}") from error

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def claim(self, config: Config, model: str) -> None:
        """Write train.json, unless OUT holds a different training.

        Args:
            config: The resolved configuration.
            model: The model to tune.

        Raises:
            ConfigError: See `check_shaping`.
        """
        check_shaping(self.root, config, model)
        saved, fleet = _read(self.root), with_absolute_paths(config)["fleet"]
        data = {
            "format": _FORMAT,
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


def check_replaceable(root: Path) -> None:
    """Refuse a directory that holds what a training would replace, but no train.json.

    Raises:
        ConfigError: It does; the message names the files.
    """
    if (root / _RECORD).exists():
        return
    there = [name for name in _WRITTEN if os.path.lexists(root / name)]
    if there:
        raise ConfigError(
            f"--out {root} holds {', '.join(there)}, but no {_RECORD} of a training, which would replace "
            "them; "
            "use another --out"
        )


def check_shaping(root: Path, config: Config, model: str) -> None:
    """Refuse to resume a training under keys that shape the weights differently, or in a run directory.

    Without a checkpoint the keys may change: no weights were shaped yet.

    Raises:
        ConfigError: Keys differ; the message names each with both values.
    """
    if (root / "run.json").exists():
        raise ConfigError(f"--out {root} is a run directory; give the training a directory of its own")
    saved = _read(root)
    if saved is None or not _has_checkpoint(root):
        return
    if different := differences(saved["shaping"], _shaping(config, model), _shaping(Config(), model)):
        raise ConfigError(
            f"--out {root} holds a training with different keys ({different}); use another --out"
        )


def recorded_sections(root: Path) -> list[tuple[str, Any]]:
    """The sections in train.json, to resume a training without its configuration file; empty without one.

    Raises:
        ConfigError: The record cannot be read, or has keys that this version does not know.
    """
    saved = _read(root)
    if saved is None:
        return []
    load(None, saved["config"].items())  # checks that this version knows each key
    found: list[tuple[str, Any]] = list(saved["config"].items())
    return found


def record_checksum(root: Path) -> int:
    """A checksum of train.json, which differs between trainings and between starts; -1 without a file."""
    try:
        return crc32((root / _RECORD).read_bytes())
    except OSError:
        return -1


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
    """The section as it is recorded for a later start."""
    section = config.train.model_dump(mode="json", exclude_none=True) | {"model": _absolute(model)}
    for key in ("out", "max_steps"):  # for one start only
        section.pop(key, None)
    bare: dict[str, Any] = without_userinfo_within(section)
    return bare


def _has_checkpoint(root: Path) -> bool:
    """Whether there is a checkpoint, by its name alone."""
    names = [path.name for path in (root / "checkpoints").glob("step-*")]
    return (root / "LATEST").exists() or any(not name.endswith(".tmp") for name in names)


def _absolute(model: str) -> str:
    """A directory as an absolute path; a name on the hub as it is."""
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
        or data.get("format") != _FORMAT
        or not isinstance(data.get("shaping"), dict)
    ):
        raise ConfigError(
            f"{path} is not a record of a training, or not in format {_FORMAT}; it cannot be resumed"
        )
    return data
