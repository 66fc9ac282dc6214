"""What is copied to the mirror, in which order, and what is already there.

The order makes the mirror a sound run directory at any time: a shard is copied and read back before the
mirror's manifest lists it, and samples wait until all contexts that they may be made of are there.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import structlog

from streamsyn.errors import ConfigError
from streamsyn.io.durable import write_whole
from streamsyn.plain_text import without_userinfo
from streamsyn.sink.manifest import removed_rows
from streamsyn.sink.mirror_epoch import (
    MANIFEST,
    OUTCOMES,
    RUN,
    MirrorEpoch,
    claim_mirror,
    created_at,
    plain,
    read_lists,
)
from streamsyn.sink.mirror_target import MirrorTarget
from streamsyn.sink.shards import KINDS

log = structlog.get_logger()

Line = dict[str, Any]
_STATE = Path("index") / "mirror.json"


class MirrorPlan:
    """Copies sealed shards to the mirror, and lists each once it is there.

    For one thread, except `missing`, which is for any.

    Args:
        root: The run directory.
        url: Where to copy it to.
        stopped: Once this is set, no copy is started and nothing in `root` is written.
        takes_over: Whether to take the mirror from a run of this machine that is alive.

    Raises (all methods):
        ConfigError: The mirror can never be used.
        TakenOver: A newer run has the mirror.
        Exception: Whatever its file system raises; try again.
    """

    def __init__(self, root: Path, url: str, stopped: threading.Event, *, takes_over: bool = False) -> None:
        self._root = root
        self._address = url
        self._url = without_userinfo(url)
        self._stopped = stopped
        self._takes_over = takes_over
        self._target: MirrorTarget | None = None
        self._epoch: MirrorEpoch | None = None
        self._lines: list[tuple[bytes, Line]] = []
        """The lines of our manifest, as bytes and decoded."""
        self._read_bytes = 0
        self._copied: dict[str, str] = {}
        """The sha256 of each shard in the mirror."""
        self._contexts = 0
        """Contexts in the mirror's shards."""
        self._listed: set[str] = set()
        """Shards that the mirror's manifest listed when this run began."""
        self._names: dict[str, str] = {}
        """The names of shards in the mirror, where they differ."""
        self._written: dict[str, bytes] = {}
        """run.json and the manifest as this run wrote them to the mirror."""

    def connect(self) -> MirrorTarget:
        """Open the mirror's file system, once."""
        if self._target is None:
            target = MirrorTarget(self._address)
            target.refuse_inside(self._root)
            self._target = target
        return self._target

    def begin(self) -> None:
        """Claim the mirror, unless it holds a different run or more of this one; drop samples that a repair
        dropped here, and find the shards that need not be copied again.
        """
        target = self.connect()
        if self._epoch is None:
            self._compared(target)  # nobody is stopped by a run that is refused
            self._epoch = claim_mirror(target, self._root, takes_over=self._takes_over)
        there = self._compared(target)
        ours = {plain(raw): line for raw, line in self._lines}
        listed = [(ours[plain(raw)], raw) for raw in there if plain(raw) in ours]
        names = {line["path"]: orjson.loads(raw)["path"] for line, raw in listed if "path" in line}
        self._listed = set(names)
        self._names = {path: name for path, name in names.items() if path != name}
        if len(listed) < len(there):  # `verify --repair` has dropped samples
            self._epoch.put_list(MANIFEST, b"".join(raw for _, raw in listed))
            for line in (orjson.loads(raw) for raw in there if plain(raw) not in ours):
                if "path" in line:
                    target.remove(line["path"])
        self._find_copied(target)
        self._refuse_lost()
        if self._listed <= self._copied.keys():
            self._update_lists(self._epoch)

    def _compared(self, target: MirrorTarget) -> list[bytes]:
        """Compare the mirror's lists with ours; returns the lines of its manifest.

        Raises:
            ConfigError: It holds a different run, or outcomes that we do not have.
        """
        there = read_lists(target)
        self._refuse_other_run(there.run)
        self._read_manifest()
        if any(line.get("kind") in OUTCOMES for line in there.lacking(raw for raw, _ in self._lines)):
            raise ConfigError(
                f"sink.mirror: {self._url} holds shards that {self._root} does not: the run has gone on "
                "elsewhere; resume it in an empty directory, or with --take-over to set this one aside"
            )
        return there.manifest

    def copy(self, needed: Mapping[str, int]) -> None:
        """Copy everything that may be copied now. If there is nothing, only check that the mirror is ours.

        Args:
            needed: For each shard of samples, the contexts that must be in the mirror first: those that the
                log held when the shard was sealed. A shard of samples that is not in it waits.
        """
        assert self._epoch is not None, "begun"
        before = self.steps
        self._read_manifest()
        while self._copy_some(self._epoch, needed):  # copied contexts allow more samples to be copied
            pass
        self._update_lists(self._epoch)
        if self.steps == before:
            self._epoch.check()

    @property
    def steps(self) -> int:
        """Number of files that this run has written to the mirror."""
        return 0 if self._epoch is None else self._epoch.steps

    def missing(self, needed: Mapping[str, int]) -> list[str]:
        """Files that may be copied now and are not in the mirror, by the manifest as it is now."""
        copied, lines = dict(self._copied), _whole_lines(self._read_here(MANIFEST))
        listed = [line for _, line in lines if "path" in line]
        missing = [
            one["path"] for one in listed if one["path"] not in copied and self._is_allowed(one, needed)
        ]
        is_behind = bool(listed) and self._written.get(MANIFEST) != self._mirror_manifest(lines)
        return missing or ([MANIFEST] if is_behind else [])

    def _copy_some(self, epoch: MirrorEpoch, needed: Mapping[str, int]) -> bool:
        """Copy what may be copied, in order; returns whether anything was."""
        copied, held = False, False
        for _, line in self._lines:
            path = line.get("path")
            if path is None or path in self._copied or (held and line["kind"] == "samples"):
                continue
            if not self._is_allowed(line, needed):
                held = True  # later shards of samples wait as well: the mirror has no gaps
                continue
            if self._stopped.is_set():
                return False
            listed = self._names.get(path, path) if path in self._listed else None
            if (name := epoch.copy(self._root / path, line, listed)) != path:
                self._names[path] = name
            self._add_copied(line)
            log.debug("mirror.copied", path=path, bytes=line["bytes"])
            self._update_lists(epoch)
            copied = True
        return copied

    def _is_allowed(self, line: Line, needed: Mapping[str, int]) -> bool:
        """Whether all contexts that a shard of samples may be made of are in the mirror."""
        if line["kind"] != "samples" or line["path"] in self._listed:
            return True
        return needed.get(line["path"], self._contexts + 1) <= self._contexts

    def _find_copied(self, target: MirrorTarget) -> None:
        """Find the shards that an earlier run has verified in the mirror, or that verify now."""
        known = mirrored_shards(self._root, self._address)
        sizes = {name: size for kind in KINDS for name, size in target.sizes(kind).items()}
        for _, line in self._lines:
            if self._stopped.is_set():
                return
            path: str = line.get("path", "")
            name = self._names.get(path, path)
            # What a different run has left there is compared when ours is copied.
            is_ours = path in self._listed or path in known
            if not is_ours or sizes.get(name) != line["bytes"]:
                continue
            if known.get(path) == line["sha256"] or target.holds(name, line["bytes"], line["sha256"]):
                self._add_copied(line)
        self._save_state()

    def _refuse_lost(self) -> None:
        """Refuse a mirror that lacks samples which retention has removed here."""
        removed = 0 if self._stopped.is_set() else removed_rows(self._root)
        for _, line in self._lines:
            path = line.get("path")
            if line.get("kind") == "samples" and line["last_seq"] < removed and path not in self._copied:
                raise ConfigError(
                    f"sink.mirror: {self._url} lacks {path}, which retention has removed from {self._root}: "
                    "copy the earlier mirror there first"
                )

    def _add_copied(self, line: Line) -> None:
        self._copied[line["path"]] = line["sha256"]
        if line["kind"] == "contexts":
            self._contexts += line["rows"]

    def _refuse_other_run(self, there: bytes | None) -> None:
        if there is not None and created_at(there) != created_at(self._read_here(RUN)):
            raise ConfigError(
                f"sink.mirror: {self._url} holds a different run than {self._root}; choose a different URL, "
                "or resume that run in an empty directory"
            )

    def _update_lists(self, epoch: MirrorEpoch) -> None:
        """Write run.json and the manifest to the mirror where they have changed, the manifest last."""
        manifest = self._mirror_manifest(self._lines)
        for name, data in ((RUN, self._read_here(RUN)), (MANIFEST, manifest)):
            if data and self._written.get(name) != data and not self._stopped.is_set():
                epoch.put_list(name, data)
                self._written[name] = data
                if name == MANIFEST:
                    self._save_state()  # only now: retention removes what this names

    def _mirror_manifest(self, lines: list[tuple[bytes, Line]]) -> bytes:
        """The lines of the manifest that are true of the mirror, with the names that shards have there."""
        kept = []
        for raw, line in lines:
            if "path" in line:
                is_true = line["path"] in self._copied
            elif line.get("flush"):
                is_true = line["contexts"] <= self._contexts
            elif line.get("retry"):
                is_true = True  # the rejects that it reopens come before it
            else:  # the final line: all shards must be there
                is_true = all(one["path"] in self._copied for _, one in lines if "path" in one)
            if is_true:
                kept.append(self._renamed(raw, line))
        return b"".join(kept)

    def _renamed(self, raw: bytes, line: Line) -> bytes:
        """A line of our manifest with the name of its shard in the mirror."""
        path = line.get("path")
        if path not in self._names:
            return raw
        return raw.replace(f'"path":"{path}"'.encode(), f'"path":"{self._names[path]}"'.encode(), 1)

    def _read_manifest(self) -> None:
        """Read the lines that were appended to our manifest since the last call."""
        new = _whole_lines(self._read_here(MANIFEST)[self._read_bytes :])
        self._lines += new
        self._read_bytes += sum(len(raw) for raw, _ in new)

    def _read_here(self, name: str) -> bytes:
        path = self._root / name
        return path.read_bytes() if path.exists() else b""

    def _save_state(self) -> None:
        if not self._stopped.is_set():
            write_whole(self._root / _STATE, orjson.dumps({"url": self._url, "shards": self._copied}))


def mirrored_shards(root: Path, url: str) -> dict[str, str]:
    """The sha256 of each shard that runs into a directory have verified in its mirror.

    Empty when the file that has them is lost or damaged, or is about a different URL: the next run verifies
    the shards again.
    """
    try:
        state = orjson.loads((root / _STATE).read_bytes())
        return dict(state["shards"]) if state["url"] == without_userinfo(url) else {}
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return {}


def _whole_lines(data: bytes) -> list[tuple[bytes, Line]]:
    """The whole lines of a manifest, as bytes and decoded."""
    return [(raw, orjson.loads(raw)) for raw in data.splitlines(keepends=True) if raw.endswith(b"\n")]
