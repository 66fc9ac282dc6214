"""The daemon's directory: ROOT/daemon.json with the version of its format, and the lock that it holds.

ROOT/daemon.json     {"format_version": 1, ...}
ROOT/daemon.lock     held by the daemon that serves ROOT
ROOT/servers.json    servers that clients added, removed and drained
ROOT/runs/ID/        run directories
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import orjson

import streamsyn
from streamsyn.errors import ConfigError
from streamsyn.io.durable import make_folder, write_whole
from streamsyn.sink.rundir import DirectoryLock, is_foreign

ROOT_FORMAT: Final = 1
_LOCK: Final = "daemon.lock"
_FILE: Final = "daemon.json"


@contextmanager
def opened_root(root: Path) -> Iterator[Path]:
    """Make the directory if necessary, check its format, and hold its lock during the block.

    Raises:
        DirectoryInUse: A different daemon serves it.
        ConfigError: It cannot be used, or was written by a later version.
    """
    try:
        names = {path.name for path in root.iterdir()} if root.exists() else set()
        foreign = sorted(filter(is_foreign, names))
        if foreign and _FILE not in names:
            raise ConfigError(
                f"{root} is not the directory of a daemon, and is not empty ({', '.join(foreign[:3])}); "
                "choose a new directory"
            )
        make_folder(root)
        lock = DirectoryLock(root, _LOCK)
    except OSError as error:
        raise ConfigError(f"cannot use {root}: {error.strerror}") from error
    try:
        _check_format(root)
        yield root
    finally:
        lock.close()


def _check_format(root: Path) -> None:
    path = root / _FILE
    try:
        found = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        content = {
            "format_version": ROOT_FORMAT,
            "created_at": time.time(),
            "created_by": streamsyn.__version__,
        }
        write_whole(path, orjson.dumps(content, option=orjson.OPT_INDENT_2))
        return
    except (OSError, orjson.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    version = found.get("format_version") if isinstance(found, dict) else None
    if not isinstance(version, int) or version > ROOT_FORMAT:
        raise ConfigError(
            f"{path} has format version {version!r}; this streamsyn reads versions up to {ROOT_FORMAT}"
        )
