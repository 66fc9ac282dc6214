"""One writer a directory: DIR/.lock is locked for as long as it has it open, and says who it is.

OUT/: the run directory, its lock, and run.json, which says how it came about.
"""

import fcntl
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

import streamsyn
from streamsyn.config.fingerprint import differences
from streamsyn.config.loading import Config, load
from streamsyn.errors import ConfigError, DirectoryInUse
from streamsyn.io.durable import write_whole
from streamsyn.sink.shards import KINDS

_NAME = ".lock"


class DirectoryLock:
    """The lock of a directory, held until `close` or the end of the process.

    Raises:
        OSError: Its file cannot be opened.
        DirectoryInUse: Another process holds it; the message says which.
    """

    def __init__(self, root: Path) -> None:
        self._file = os.open(root / _NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(self._file)
            os.close(self._file)
            raise DirectoryInUse(f"{root} is in use by another process ({holder})") from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"pid {os.getpid()} on {platform.node()}".encode(), 0)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._file)


def wait_until_free(root: Path, on_wait: Callable[[str], None]) -> None:
    """Return when nobody holds the lock of `root`; `on_wait` is told who does, if one has to wait."""
    try:
        file = os.open(root / _NAME, os.O_RDWR)
    except OSError:
        return  # nobody was here before, or locking it will say what is wrong
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        on_wait(_holder(file))
        fcntl.flock(file, fcntl.LOCK_EX)
    finally:
        os.close(file)


def _holder(file: int) -> str:
    return os.pread(file, 100, 0).decode(errors="replace").strip()


FORMAT = 1
_REPORTED = ("aiohttp", "jinja2", "orjson", "pydantic", "zstandard")

_LATE = frozenset({"model", "scoring.model", "scoring.prompt", "checks.eval_sets"})
"""Keys of the fingerprint that are known only once servers, or large files, have been asked."""
_NO_DEFAULTS: Mapping[str, Any] = {}


class RunDirectory:
    """A run directory, locked against other writers for as long as it is open.

    Raises:
        DirectoryInUse: Another process has it open.
        ConfigError: It cannot be made, or is something else.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            for folder in (*KINDS, "index"):
                (root / folder).mkdir(parents=True, exist_ok=True)
            self._lock = DirectoryLock(root)
        except OSError as error:
            raise ConfigError(f"cannot make the run directory {root}: {error.strerror}") from error

    def close(self) -> None:
        """Let go of the lock."""
        self._lock.close()

    def check(self, fingerprint: dict[str, Any], defaults: Mapping[str, Any] = _NO_DEFAULTS) -> None:
        """Refuse to go on with a run whose outputs were shaped otherwise.

        A `fingerprint` without `model` is of a run that has not asked its servers yet. A key that was not
        there yet when the run began had its value of `defaults`.

        Raises:
            ConfigError: Keys differ; the message names each with both values.
        """
        if (saved := self.saved()) is None:
            return
        now = orjson.loads(orjson.dumps(fingerprint))
        before = saved["fingerprint"]
        if "model" not in now:  # the servers have not been asked yet
            before, now = ({k: v for k, v in keys.items() if k not in _LATE} for keys in (before, now))
        if different := differences(before, now, defaults):
            raise ConfigError(
                f"{self.root} holds a run of another configuration ({different}); use another --out"
            )

    def saved(self) -> dict[str, Any] | None:
        """What run.json says; None in a new directory."""
        return read_run_json(self.root)

    def save(self, config: dict[str, Any], fingerprint: dict[str, Any]) -> None:
        """Write run.json, whole or not at all."""
        before = self.saved() or {}
        data = {
            "format": FORMAT,
            "created_at": before.get("created_at", time.time()),
            "updated_at": time.time(),
            "config": config,
            "fingerprint": fingerprint,
            "versions": {
                "streamsyn": streamsyn.__version__,
                "python": platform.python_version(),
                **{name: version(name) for name in _REPORTED},
            },
        }
        write_whole(self.root / "run.json", orjson.dumps(data, option=orjson.OPT_INDENT_2))


def read_run_json(root: Path) -> dict[str, Any] | None:
    """What OUT/run.json says; None when there is none.

    Raises:
        ConfigError: It cannot be read, is of a newer format, or lacks what every run.json has.
    """
    path = root / "run.json"
    try:
        data: dict[str, Any] = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, orjson.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is no run.json: it holds no object")
    if data.get("format") != FORMAT:
        raise ConfigError(f"{path} is of format {data.get('format')!r}; this streamsyn reads format {FORMAT}")
    for key in ("config", "fingerprint"):
        if not isinstance(data.get(key), dict):
            raise ConfigError(f"{path} is no run.json: it has no {key}")
    return data


def saved_config(root: Path) -> Config | None:
    """The configuration in OUT/run.json; None when there is none.

    Raises:
        ConfigError: It cannot be read, or a key or value is unknown to this version.
    """
    saved = read_run_json(root)
    if saved is None:
        return None
    try:
        return load(None, _without_nulls(saved["config"]).items())
    except ConfigError as error:
        raise ConfigError(f"{root / 'run.json'}: {error}") from error


def _without_nulls(section: dict[str, Any]) -> dict[str, Any]:
    """Null is what is not set, and what JSON makes of `inf`, which only operational keys can be."""
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value is not None
    }
