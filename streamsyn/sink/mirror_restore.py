"""A run goes on from its mirror, in an empty directory on a different node."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import structlog

from streamsyn.errors import ConfigError
from streamsyn.io.durable import sync_folder, write_whole
from streamsyn.io.places import reason, translated
from streamsyn.sink.mirror_epoch import MANIFEST, RUN, MirrorLists, claim_mirror, plain, read_lists
from streamsyn.sink.mirror_target import MirrorTarget
from streamsyn.sink.rundir import RunDirectory, checked_run_json
from streamsyn.sink.shards import KINDS

log = structlog.get_logger()

_MARKER = "mirror.restoring"
"""In index/ while files are fetched: what is there is incomplete, and is fetched again."""


def restore(
    directory: RunDirectory, url: str, refuse: Callable[[dict[str, Any]], None], *, takes_over: bool
) -> None:
    """Fetch a run from its mirror if the directory is empty and the mirror has one; log it in one line.

    The mirror is claimed first, so what is fetched is all that counts of it.

    Args:
        directory: The directory, open.
        url: The mirror.
        refuse: Raises ConfigError if the run of this run.json may not be resumed.
        takes_over: Whether to take the mirror from a run of this machine that is alive. There has been a run
            then, so a mirror that does not answer is an error.

    Raises:
        ConfigError: The URL cannot be used, files cannot be fetched, or `refuse` has refused.
    """
    marker = directory.root / "index" / _MARKER
    if not marker.exists() and _has_run(directory.root):
        return
    try:
        target = MirrorTarget(url)
        target.refuse_inside(directory.root)
        there = read_lists(target)
    except ConfigError:
        raise
    except Exception as error:  # each file system has errors of its own
        if takes_over:
            raise ConfigError(
                f"sink.mirror: {url} does not answer ({reason(error)}), and {directory.root} is empty: "
                "run again when it does"
            ) from error
        log.warning("mirror.behind", url=url, why=reason(error), then="a run that it holds is not restored")
        return
    if there.run is None:
        return
    refuse(checked_run_json(there.run, f"{target.url}/{RUN}"))
    with translated(f"restore {directory.root} from sink.mirror {target.url}"):
        claim_mirror(target, directory.root, takes_over=takes_over)
        rows = _fetch(directory.root, target, read_lists(target), marker)
    directory.reopen()
    log.info(
        "mirror.restored", url=target.url, **rows, then="the run goes on; what is not there is made again"
    )


def _has_run(root: Path) -> bool:
    paths = (root / RUN, *(path for kind in KINDS for path in (root / kind).glob("part-*")))
    manifest = root / MANIFEST
    return any(path.exists() for path in paths) or (manifest.exists() and manifest.stat().st_size > 0)


def _fetch(root: Path, target: MirrorTarget, there: MirrorLists, marker: Path) -> dict[str, int]:
    """Fetch what the mirror lists, the manifest and run.json last; returns the numbers of rows."""
    marker.touch()
    rows = dict.fromkeys(KINDS, 0)
    for raw in there.manifest:
        line, name = orjson.loads(plain(raw)), orjson.loads(raw).get("path")
        if name is not None:
            target.download(name, root / line["path"], line["bytes"], line["sha256"])
            rows[line["kind"]] += line["rows"]
    for kind in KINDS:
        sync_folder(root / kind)
    write_whole(root / MANIFEST, b"".join(map(plain, there.manifest)))
    write_whole(root / RUN, there.run or b"")
    marker.unlink()
    return rows
