"""A run goes on from its mirror, in an empty directory on a different node."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import structlog

from streamsyn.errors import ConfigError
from streamsyn.io.durable import make_folder, sync_folder, write_whole
from streamsyn.io.places import reason, translated
from streamsyn.sink.mirror_epoch import (
    MANIFEST,
    OUTCOMES,
    RUN,
    MirrorLists,
    claim_mirror,
    created_at,
    plain,
    read_lists,
)
from streamsyn.sink.mirror_target import MirrorTarget
from streamsyn.sink.rundir import RunDirectory, checked_run_json, is_foreign
from streamsyn.sink.shards import KINDS

log = structlog.get_logger()

_MARKER = "mirror.restoring"
"""In index/ while files are fetched: what is there is incomplete, and is fetched again."""
_ASIDE = "behind-"
"""The beginning of the names of folders for what was set aside."""
_KEPT = ("epochs", "templates", "training")
"""Folders that are not set aside."""


def restore(
    directory: RunDirectory, url: str, refuse: Callable[[dict[str, Any]], None], *, takes_over: bool
) -> None:
    """Fetch a run from its mirror if the directory is empty and the mirror has one; log it in one line.

    The mirror is claimed first, so what is fetched is all that counts of it.

    Args:
        directory: The directory, open.
        url: The mirror.
        refuse: Raises ConfigError if the run of this run.json may not be resumed.
        takes_over: Whether the run was begun, so that a mirror that does not answer is an error, and may be
            alive, here or elsewhere. A directory that lacks outcomes of the mirror is then set aside.

    Raises:
        ConfigError: The URL cannot be used, files cannot be fetched, or `refuse` has refused.
        SinkError: The directory cannot be set aside.
    """
    root = directory.root
    marker = root / "index" / _MARKER
    has_run = _has_run(root) and not marker.exists()
    if has_run and not takes_over:
        return
    target, there = _read(root, url, must_answer=takes_over and not has_run)
    if target is None or there.run is None or (has_run and not _is_behind(directory, there)):
        return
    refuse(checked_run_json(there.run, f"{target.url}/{RUN}"))
    with translated(f"restore {root} from sink.mirror {target.url}"):
        claim_mirror(target, root, takes_over=takes_over)
        if has_run:
            _set_aside(directory)
        rows = _fetch(root, target, read_lists(target), marker)
    directory.reopen()
    log.info(
        "mirror.restored", url=target.url, **rows, then="the run goes on; what is not there is made again"
    )


def _read(root: Path, url: str, *, must_answer: bool) -> tuple[MirrorTarget | None, MirrorLists]:
    """The mirror and its lists; None if it does not answer."""
    try:
        target = MirrorTarget(url)
        target.refuse_inside(root)
        return target, read_lists(target)
    except ConfigError:
        raise
    except Exception as error:  # each file system has errors of its own
        if must_answer:
            raise ConfigError(
                f"sink.mirror: {url} does not answer ({reason(error)}), and {root} is empty: "
                "run again when it does"
            ) from error
        log.warning("mirror.behind", url=url, why=reason(error), then="a run that it holds is not restored")
        return None, MirrorLists(None, [])


def _has_run(root: Path) -> bool:
    paths = (root / RUN, *(path for kind in KINDS for path in (root / kind).glob("part-*")))
    manifest = root / MANIFEST
    return any(path.exists() for path in paths) or (manifest.exists() and manifest.stat().st_size > 0)


def _is_behind(directory: RunDirectory, there: MirrorLists) -> bool:
    """Whether the directory has an older state of the run that its mirror has: it went on elsewhere."""
    here, manifest = directory.saved(), directory.root / MANIFEST
    if here is None or there.run is None or here.get("created_at") != created_at(there.run):
        return False
    data = manifest.read_bytes() if manifest.exists() else b""
    return any(line.get("kind") in OUTCOMES for line in there.lacking(data.splitlines(keepends=True)))


def _set_aside(directory: RunDirectory) -> None:
    """Move the run in a directory to a folder in it; after a kill, the rest is moved the next time."""
    root = directory.root
    aside = root / f"{_ASIDE}{directory.epoch.number:08d}"
    paths = [
        path
        for path in root.iterdir()
        if is_foreign(path.name) and path.name not in _KEPT and not path.name.startswith(_ASIDE)
    ]
    make_folder(aside)
    last = {MANIFEST: 1, RUN: 2}  # without these two, nobody could tell whose rows the others are
    for path in sorted(paths, key=lambda path: last.get(path.name, 0)):
        path.rename(aside / path.name)
        sync_folder(root)
    for kind in (*KINDS, "index"):
        make_folder(root / kind)
    log.warning("mirror.set_aside", out=str(root), to=str(aside), why="the run has gone on elsewhere since")


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
