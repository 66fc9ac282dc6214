"""ROOT/servers.json: the servers that clients added, removed and drained, beside those of the configuration.

{"format_version": 1, "added": [{"url", "weight", "key_env", "query"}], "removed": [URL], "draining": [URL]}
"""

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from streamsyn.errors import ConfigError
from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.fleet.sharing import ServerEdits
from streamsyn.io.durable import write_whole

FILE: Final = "servers.json"


class _Added(BaseModel):
    url: str
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    key_env: str | None
    query: str


class _File(BaseModel):
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
    path = root / FILE
    try:
        found = _File.model_validate_json(path.read_bytes())
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
    content = _File(added=added, removed=sorted(edits.removed), draining=sorted(edits.draining))
    write_whole(root / FILE, content.model_dump_json(indent=2).encode())
