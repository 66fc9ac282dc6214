"""Samples that retention has removed: DIR/removed.json has the number of rows before the first one left.

Only whole shards of samples are removed, the oldest first, once a mirror has them. The manifest still lists
them, so no number changes. The file is written before the shards are deleted: a listed shard that is missing
is damage, unless this file covers it.
"""

from collections.abc import Sequence
from pathlib import Path

import orjson

from streamsyn.errors import SinkError
from streamsyn.io.durable import disk_errors, sync_folder, write_whole
from streamsyn.sink.manifest import SealedShard

_FILE = "removed.json"
_FORMAT = 1


def removed_rows(root: Path) -> int:
    """Number of samples that were removed from a run directory: those with a smaller `seq`.

    Raises:
        SinkError: The file is damaged, or of a later format.
    """
    path = root / _FILE
    try:
        data = orjson.loads(path.read_bytes())
        if data["format"] != _FORMAT:
            raise SinkError(f"{path} has format {data['format']!r}; this streamsyn reads format {_FORMAT}")
        return int(data["samples"])
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise SinkError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise SinkError(f"{path} is damaged: {error}; restore it from a copy") from error


def remove_samples(root: Path, shards: Sequence[SealedShard]) -> None:
    """Remove sealed shards of samples, the oldest that are left. After a kill, call it again.

    Raises:
        SinkError: They cannot be removed.
    """
    rows = max(removed_rows(root), shards[-1].last_seq + 1)
    write_whole(root / _FILE, orjson.dumps({"format": _FORMAT, "samples": rows}))
    with disk_errors(f"remove samples of {root}"):
        for shard in shards:
            (root / shard.path).unlink(missing_ok=True)
        sync_folder(root / "samples")
