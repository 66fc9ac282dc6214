"""The run directory: its folders, its lock, and run.json with the configuration and fingerprint of the run.

A directory has one writer at a time: whoever holds the lock of DIR/.lock, which names the process. Where
locks cannot be trusted, on a file system of several machines, the newest epoch decides (`sink/epoch.py`).
"""

import fcntl
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

import streamsyn
from streamsyn.config.fingerprint import differences
from streamsyn.config.loading import Config, load
from streamsyn.errors import ConfigError, DirectoryInUse, SinkError, TakenOver
from streamsyn.io.durable import make_folder, write_whole
from streamsyn.sink.epoch import claim
from streamsyn.sink.shards import KINDS, OPEN_SUFFIX

FORMAT = 1
_HOSTED = "service.json"
"""Made by a daemon in its runs."""
_OURS = frozenset(
    {*KINDS, "index", "epochs", "spool", "templates", "training", "run.json", "manifest.jsonl", ".lock"}
    | {_HOSTED, "consumers.json"}
)
_BESIDES = (".toml", ".j2", ".log", "lost+found")
"""Endings of what may lie in a directory before its run begins."""
_GROWING = ("manifest.jsonl", "spool/stdin.jsonl", f"*/part-*{OPEN_SUFFIX}")
"""Files that a writer of a run directory holds open. The inbox is not among them: it was opened before."""
_LOOKS = 1000
"""Times that a lock is tried while others look at it."""
LOCK_NAME = ".lock"
"""In a directory that one process at a time writes to."""
_REPORTED = ("aiohttp", "jinja2", "orjson", "pydantic", "zstandard")

_LATE = frozenset({"model", "scoring.model", "scoring.prompt", "checks.eval_sets"})
"""Keys of the fingerprint that are known only after servers have answered or large files were read."""
_NO_DEFAULTS: Mapping[str, Any] = {}


class RunDirectory:
    """A run directory, created if necessary and locked against other writers until `close`.

    Args:
        root: The directory.
        take_over: Do not wait for a process that holds the lock, and may be gone or alive: it stops.

    Attributes:
        epoch: That of this opening, the newest one.

    Raises:
        DirectoryInUse: A different process has it open.
        TakenOver: A newer process has opened it meanwhile.
        ConfigError: It cannot be created, or cannot be taken over, as it is that of a daemon.
        SinkError: A file that is not ours has the name of the last epoch.
    """

    def __init__(self, root: Path, *, take_over: bool = False) -> None:
        self.root = root
        self._lock: DirectoryLock | None = None
        _refuse_foreign(root)
        try:
            for folder in (*KINDS, "index"):
                make_folder(root / folder)
            try:
                self._lock = DirectoryLock(root)
            except (OSError, DirectoryInUse) as error:
                if not take_over:
                    raise
                if (root / _HOSTED).exists():
                    raise ConfigError(
                        f"{root} is a run of a daemon, which would go on to accept seeds that do not count: "
                        f"stop the daemon instead of --take-over ({error})"
                    ) from error
            self.epoch = claim(root, _GROWING, is_locked=self._lock is not None)
        except OSError as error:
            self._unlock()
            raise ConfigError(f"cannot make the run directory {root}: {error.strerror}") from error
        except (TakenOver, SinkError):
            self._unlock()
            raise

    def close(self) -> None:
        """Release the lock."""
        self.epoch.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def check(
        self,
        fingerprint: dict[str, Any],
        defaults: Mapping[str, Any] = _NO_DEFAULTS,
        may_differ: Callable[[str], bool] | None = None,
    ) -> None:
        """Refuse to resume a run under a different fingerprint.

        Args:
            fingerprint: What shapes outputs now. Without `model` (the servers have not answered yet), the
                keys that are known late are not compared.
            defaults: Values of keys that did not exist yet when the run began.
            may_differ: Of a retry: whether it may change a key.

        Raises:
            ConfigError: Keys differ; the message names each with both values.
        """
        if (saved := self.saved()) is not None:
            refuse_different(self.root, saved, fingerprint, defaults, may_differ)

    def reopen(self) -> None:
        """Claim a further epoch: the files of a mirror that are here now name newer ones."""
        self.epoch.close()
        self.epoch = claim(self.root, _GROWING, is_locked=self._lock is not None)

    def saved(self) -> dict[str, Any] | None:
        """The content of run.json; None in a new directory."""
        return read_run_json(self.root)

    def save(
        self,
        config: dict[str, Any],
        fingerprint: dict[str, Any],
        rows: Mapping[str, int] = _NO_DEFAULTS,
    ) -> None:
        """Replace run.json atomically, keeping the time of its creation.

        Args:
            config: The configuration from now on.
            fingerprint: Its fingerprint.
            rows: Numbers of contexts and rejects so far. If a retry has changed the fingerprint, they tell
                which rows were written under the one before it, which goes to the list `replaced`.
        """
        before = self.saved() or {}
        replaced = list(before.get("replaced", ()))
        changed = before and before["fingerprint"] != orjson.loads(orjson.dumps(fingerprint))
        if rows and changed:
            kept = {key: before.get(key) for key in ("config", "fingerprint", "versions")}
            replaced.append({"rows_before": dict(rows), **kept})
        data: dict[str, Any] = {
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
        if replaced:
            data["replaced"] = replaced
        self.epoch.check()
        write_whole(self.root / "run.json", orjson.dumps(data, option=orjson.OPT_INDENT_2))


def refuse_different(
    root: Path | str,
    saved: dict[str, Any],
    fingerprint: dict[str, Any],
    defaults: Mapping[str, Any] = _NO_DEFAULTS,
    may_differ: Callable[[str], bool] | None = None,
) -> None:
    """Refuse to resume the run of a run.json under a different fingerprint; as `RunDirectory.check`.

    Args:
        root: The directory or mirror that holds it, for messages.
        saved: The content of run.json.
        fingerprint: As there.
        defaults: As there.
        may_differ: As there.

    Raises:
        ConfigError: Keys differ.
    """
    now = orjson.loads(orjson.dumps(fingerprint))
    before = saved["fingerprint"]
    if "model" not in now:  # the servers have not answered yet
        before, now = ({k: v for k, v in keys.items() if k not in _LATE} for keys in (before, now))
    if may_differ is not None:
        before, now, defaults = (
            {key: value for key, value in keys.items() if not may_differ(key)}
            for keys in (before, now, defaults)
        )
    if not (different := differences(before, now, defaults)):
        return
    if may_differ is not None:
        raise ConfigError(
            f"a retry cannot change what the other rows of {root} depend on ({different}); "
            "start a new run for that"
        )
    other = "--out" if isinstance(root, Path) else "sink.mirror"
    raise ConfigError(
        f"{root} holds a run with a different configuration ({different}); choose a different {other}"
    )


def read_run_json(root: Path) -> dict[str, Any] | None:
    """The content of OUT/run.json; None when it does not exist.

    Raises:
        ConfigError: It cannot be read, has a different format version, or lacks a key.
    """
    path = root / "run.json"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return checked_run_json(content, path)


def checked_run_json(content: bytes, path: Path | str) -> dict[str, Any]:
    """The content of the run.json at `path`, decoded.

    Raises:
        ConfigError: It is damaged, has a different format version, or lacks a key.
    """
    try:
        data: dict[str, Any] = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not a valid run.json: it is not a JSON object")
    if data.get("format") != FORMAT:
        raise ConfigError(f"{path} has format {data.get('format')!r}; this streamsyn reads format {FORMAT}")
    for key in ("config", "fingerprint"):
        if not isinstance(data.get(key), dict):
            raise ConfigError(f"{path} is not a valid run.json: it has no {key}")
    return data


def saved_config(root: Path) -> Config | None:
    """The configuration in OUT/run.json; None when it does not exist.

    Raises:
        ConfigError: It cannot be read, or this version does not know a key or a value.
    """
    saved = read_run_json(root)
    if saved is None:
        return None
    try:
        return load(None, _without_nulls(saved["config"]).items())
    except ConfigError as error:
        raise ConfigError(f"{root / 'run.json'}: {error}") from error


def _without_nulls(section: dict[str, Any]) -> dict[str, Any]:
    """Drop nulls: keys that are not set, or are `inf`, which JSON cannot hold."""
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value is not None
    }


def is_foreign(name: str) -> bool:
    """Whether a file of this name must not lie in a directory before it is used."""
    return not name.startswith(".") and not name.endswith(_BESIDES)


def _refuse_foreign(root: Path) -> None:
    """Refuse a directory that holds something else than a run: its path may be a mistake.

    Configurations, templates, logs and hidden files may lie in a directory before its run begins.

    Raises:
        ConfigError: The directory is foreign, or cannot be read.
    """
    try:
        names = {path.name for path in root.iterdir()} if root.is_dir() else set()
    except OSError as error:
        raise ConfigError(f"cannot read the run directory {root}: {error.strerror}") from error
    if names & _OURS:
        return
    foreign = sorted(filter(is_foreign, names))
    if foreign:
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise ConfigError(
            f"--out {root} is not a run directory, and is not empty ({shown}); choose a new directory"
        )


class DirectoryLock:
    """The lock of a directory, held until `close` or the end of the process.

    Args:
        root: The directory.
        name: The name of the lock file in it.

    Raises:
        OSError: The lock file cannot be opened.
        DirectoryInUse: A different process holds the lock; the message names it.
    """

    def __init__(self, root: Path, name: str = LOCK_NAME) -> None:
        self._file = os.open(root / name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(self._file)
        except BlockingIOError:
            holder = _text(self._file)
            os.close(self._file)
            raise DirectoryInUse(f"{root} is in use by another process ({holder})") from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"pid {os.getpid()} on {platform.node()}".encode(), 0)

    def close(self) -> None:
        """Release the lock."""
        os.close(self._file)


def _lock(file: int) -> None:
    """Take a lock that nobody writes under. Who only looks at it (`holder_of`) holds it shared for a moment.

    Raises:
        BlockingIOError: A different process holds it.
    """
    for _ in range(_LOOKS):
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    raise BlockingIOError


def holder_of(root: Path) -> str | None:
    """The text that names the process that holds the lock of a directory; None if nobody does."""
    try:
        file = os.open(root / LOCK_NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _text(file) or "an unknown process"
    finally:
        os.close(file)
    return None


def wait_until_free(root: Path, on_wait: Callable[[str], None]) -> None:
    """Wait until no process holds the lock of `root`; `on_wait` is called with its holder."""
    try:
        file = os.open(root / LOCK_NAME, os.O_RDONLY)
    except OSError:
        return  # a new directory; or locking it will report the error
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        on_wait(_text(file))
        fcntl.flock(file, fcntl.LOCK_SH)
    finally:
        os.close(file)


def _text(file: int) -> str:
    """The text in an open lock file, which names the process that holds the lock."""
    return os.pread(file, 100, 0).decode(errors="replace").strip()
