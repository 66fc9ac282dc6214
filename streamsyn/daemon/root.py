"""ROOT, the daemon's directory: format version, lock, and servers that clients added, removed or drained.

ROOT/daemon.json     {"format_version": 1, ...}
ROOT/daemon.lock     held by the daemon that serves ROOT
ROOT/epochs/         which daemon may write, where locks cannot be trusted; see `streamsyn.sink.epoch`
ROOT/servers.json    {"format_version": 1, "added": [{"url", "weight", "key_env", "query"}], "removed": [URL],
                     "draining": [URL]}: servers beside those of the configuration
ROOT/runs/ID/        run directories
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import streamsyn
from streamsyn.errors import ConfigError
from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.fleet.shared_servers import ServerEdits
from streamsyn.io.durable import disk_errors, make_folder, write_whole
from streamsyn.sink.epoch import Epoch, claim
from streamsyn.sink.rundir import DirectoryLock, is_foreign

ROOT_FORMAT: Final = 1
_LOCK: Final = "daemon.lock"
_FILE: Final = "daemon.json"
SERVERS_FILE: Final = "servers.json"


@contextmanager
def opened_root(root: Path) -> Iterator[Epoch]:
    """Make the directory if necessary, check its format, and hold its lock and epoch during the block.

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
        with disk_errors(f"claim {root}"):
            epoch = claim(root, (), is_locked=True)
        try:
            yield epoch
        finally:
            epoch.close()
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


class _Added(BaseModel):
    url: str
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    key_env: str | None
    query: str


class _ServersFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = 1
    added: list[_Added] = []
    removed: list[str] = []
    draining: list[str] = []


def read_edits(root: Path) -> ServerEdits:
    """Read what clients changed; nothing if they have not changed anything.

    Raises:
        ConfigError: The file cannot be read.
    """
    path = root / SERVERS_FILE
    try:
        found = _ServersFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return ServerEdits()
    except (OSError, ValidationError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; move it away to use the configuration") from error
    specs = [ServerSpec(one.url, one.weight, one.key_env, query=one.query) for one in found.added]
    return ServerEdits({spec.url: spec for spec in specs}, set(found.removed), set(found.draining))


def save_edits(root: Path, edits: ServerEdits) -> None:
    """Write what clients changed, whole and synced.

    Raises:
        SinkError: The file cannot be written.
    """
    added = [
        _Added(url=spec.url, weight=spec.weight, key_env=spec.key_env, query=spec.query)
        for spec in edits.added.values()
    ]
    content = _ServersFile(added=added, removed=sorted(edits.removed), draining=sorted(edits.draining))
    write_whole(root / SERVERS_FILE, content.model_dump_json(indent=2).encode())
