"""What is copied to the mirror, in which order, and what is already there.

The order makes the mirror a sound run directory at any time: a shard is copied and read back before the
mirror's manifest lists it, and samples wait until all contexts that they may be made of are there.
"""

import hashlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import structlog

from streamsyn.errors import ConfigError, SinkError
from streamsyn.io.durable import write_whole
from streamsyn.io.places import names_below, open_url
from streamsyn.plain_text import without_userinfo
from streamsyn.sink import shards
from streamsyn.sink.manifest import removed_rows
from streamsyn.sink.shards import KINDS

log = structlog.get_logger()

Line = dict[str, Any]
_MANIFEST = "manifest.jsonl"
_RUN = "run.json"
_STATE = Path("index") / "mirror.json"


class MirrorPlan:
    """Copies sealed shards to the mirror, and lists each once it is there.

    For one thread, except `missing`, which is for any.

    Args:
        root: The run directory.
        url: Where to copy it to.
        stopped: Once this is set, no copy is started and nothing in `root` is written.

    Raises (all methods):
        ConfigError: The mirror can never be used.
        Exception: Whatever its file system raises; try again.
    """

    def __init__(self, root: Path, url: str, stopped: threading.Event) -> None:
        self._root = root
        self._address = url
        self._url = without_userinfo(url)
        self._stopped = stopped
        self._target: MirrorTarget | None = None
        self._lines: list[tuple[bytes, Line]] = []
        """The lines of our manifest, as bytes and decoded."""
        self._read_bytes = 0
        self._copied: dict[str, str] = {}
        """The sha256 of each shard in the mirror."""
        self._contexts = 0
        """Contexts in the mirror's shards."""
        self._listed: set[str] = set()
        """Shards that the mirror's manifest listed when this run began."""
        self._written: dict[str, bytes] = {}
        """run.json and the manifest as this run wrote them to the mirror."""

    def connect(self) -> "MirrorTarget":
        """Open the mirror's file system, once."""
        if self._target is None:
            target = MirrorTarget(self._address)
            target.refuse_inside(self._root)
            self._target = target
        return self._target

    def begin(self) -> None:
        """Compare the mirror with the run directory: refuse a different run, drop samples that a repair
        dropped here, and find the shards that need not be copied again.
        """
        target = self.connect()
        self._refuse_other_run(target)
        there = [
            raw for raw in (target.read(_MANIFEST) or b"").splitlines(keepends=True) if raw[-1:] == b"\n"
        ]
        self._read_manifest()
        here = {raw for raw, _ in self._lines}
        gone = [orjson.loads(raw) for raw in there if raw not in here]
        if any(line.get("kind") in ("contexts", "rejects") for line in gone):
            raise ConfigError(
                f"sink.mirror: {self._url} holds shards that {self._root} does not: restore them from there"
            )
        if gone:  # `verify --repair` has dropped samples
            target.put(_MANIFEST, b"".join(raw for raw in there if raw in here))
            for path in filter(None, (line.get("path") for line in gone)):
                target.remove(path)
        listed = set(there)
        self._listed = {line["path"] for raw, line in self._lines if "path" in line and raw in listed}
        self._find_copied(target)
        self._refuse_lost()

    def copy(self, needed: Mapping[str, int]) -> None:
        """Copy everything that may be copied now.

        Args:
            needed: For each shard of samples, the contexts that must be in the mirror first: those that the
                log held when the shard was sealed. A shard of samples that is not in it waits.
        """
        target = self.connect()
        self._read_manifest()
        while self._copy_some(target, needed):  # copied contexts allow more samples to be copied
            pass
        self._update_lists(target)

    @property
    def copied(self) -> int:
        """Number of shards in the mirror."""
        return len(self._copied)

    def missing(self, needed: Mapping[str, int]) -> list[str]:
        """Files that may be copied now and are not in the mirror, by the manifest as it is now."""
        copied, lines = dict(self._copied), _whole_lines(self._read_here(_MANIFEST))
        listed = [line for _, line in lines if "path" in line]
        missing = [
            one["path"] for one in listed if one["path"] not in copied and self._is_allowed(one, needed)
        ]
        is_behind = bool(listed) and self._written.get(_MANIFEST) != self._mirror_manifest(lines)
        return missing or ([_MANIFEST] if is_behind else [])

    def _copy_some(self, target: "MirrorTarget", needed: Mapping[str, int]) -> bool:
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
            target.copy(self._root / path, path, line["bytes"], line["sha256"])
            self._add_copied(line)
            self._save_state()
            log.debug("mirror.copied", path=path, bytes=line["bytes"])
            self._update_lists(target)
            copied = True
        return copied

    def _is_allowed(self, line: Line, needed: Mapping[str, int]) -> bool:
        """Whether all contexts that a shard of samples may be made of are in the mirror."""
        if line["kind"] != "samples" or line["path"] in self._listed:
            return True
        return needed.get(line["path"], self._contexts + 1) <= self._contexts

    def _find_copied(self, target: "MirrorTarget") -> None:
        """Find the shards that an earlier run has verified in the mirror, or that verify now."""
        known = mirrored_shards(self._root, self._address)
        sizes = {name: size for kind in KINDS for name, size in target.sizes(kind).items()}
        for _, line in self._lines:
            if self._stopped.is_set():
                return
            path = line.get("path")
            if path is None or sizes.get(path) != line["bytes"]:
                continue
            if known.get(path) == line["sha256"] or target.holds(path, line["bytes"], line["sha256"]):
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

    def _refuse_other_run(self, target: "MirrorTarget") -> None:
        there = target.read(_RUN)
        if there is not None and _created_at(there) != _created_at(self._read_here(_RUN)):
            raise ConfigError(
                f"sink.mirror: {self._url} holds a different run than {self._root}; choose a different URL, "
                "or copy the mirror back and resume that run"
            )

    def _update_lists(self, target: "MirrorTarget") -> None:
        """Write run.json and the manifest to the mirror where they have changed, the manifest last."""
        if _RUN not in self._written:
            self._refuse_other_run(target)  # a different run may have begun at the same time
        manifest = self._mirror_manifest(self._lines)
        for name, data in ((_RUN, self._read_here(_RUN)), (_MANIFEST, manifest)):
            if data and self._written.get(name) != data and not self._stopped.is_set():
                target.put(name, data)
                self._written[name] = data

    def _mirror_manifest(self, lines: list[tuple[bytes, Line]]) -> bytes:
        """The lines of the manifest that are true of the mirror."""
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
                kept.append(raw)
        return b"".join(kept)

    def _read_manifest(self) -> None:
        """Read the lines that were appended to our manifest since the last call."""
        new = _whole_lines(self._read_here(_MANIFEST)[self._read_bytes :])
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


class CopyMismatch(SinkError):
    """Raised when a file in the mirror, read back, differs from what was written."""


class MirrorTarget:
    """The mirror's files, behind a URL. Every method may block, and raises whatever its file system raises.

    Names are paths relative to the run directory.

    Raises:
        ConfigError: The URL's protocol is unknown, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        self._filesystem, self._path = open_url(url, "sink.mirror")

    def refuse_inside(self, root: Path) -> None:
        """Refuse a mirror inside the run directory that it copies.

        Raises:
            ConfigError: The mirror is inside `root`.
        """
        from fsspec.implementations.local import LocalFileSystem

        if isinstance(self._filesystem, LocalFileSystem):
            place = Path(self._path).resolve()
            if place.is_relative_to(root.resolve()):
                raise ConfigError(f"sink.mirror: {place} is inside the run directory: choose a place outside")

    def sizes(self, folder: str) -> dict[str, int]:
        """Sizes in bytes of the files in a folder, by name."""
        below = names_below(self._filesystem, f"{self._path}/{folder}")
        return {f"{folder}/{name}": size for name, size in below.items()}

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None when it does not exist."""
        self._filesystem.invalidate_cache()
        try:
            return b"".join(self._chunks(name))
        except FileNotFoundError:
            return None

    def holds(self, name: str, size: int, sha256: str) -> bool:
        """Whether a file exists with this size and sha256; reads all of it."""
        self._filesystem.invalidate_cache()
        hashed, found = hashlib.sha256(), 0
        try:
            for chunk in self._chunks(name):
                hashed.update(chunk)
                found += len(chunk)
        except FileNotFoundError:
            return False
        return (found, hashed.hexdigest()) == (size, sha256)

    def copy(self, path: Path, name: str, size: int, sha256: str) -> None:
        """Copy a file, and read it back.

        Raises:
            CopyMismatch: What was read back differs.
        """
        self._make_folder(name)
        self._filesystem.put_file(str(path), f"{self._path}/{name}")
        if not self.holds(name, size, sha256):
            raise CopyMismatch(f"{name} was not read back as it was written")

    def put(self, name: str, data: bytes) -> None:
        """Write a small file whole, and read it back.

        Raises:
            CopyMismatch: What was read back differs.
        """
        self._make_folder(name)
        self._filesystem.pipe_file(f"{self._path}/{name}", data)
        if self.read(name) != data:
            raise CopyMismatch(f"{name} was not read back as it was written")

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        if self._filesystem.isfile(f"{self._path}/{name}"):
            self._filesystem.rm_file(f"{self._path}/{name}")

    def _make_folder(self, name: str) -> None:
        self._filesystem.makedirs(f"{self._path}/{name}".rpartition("/")[0], exist_ok=True)

    def _chunks(self, name: str) -> Iterator[bytes]:
        with self._filesystem.open(f"{self._path}/{name}", "rb") as file:
            while chunk := file.read(shards.CHUNK_BYTES):
                yield chunk


def _whole_lines(data: bytes) -> list[tuple[bytes, Line]]:
    """The whole lines of a manifest, as bytes and decoded."""
    return [(raw, orjson.loads(raw)) for raw in data.splitlines(keepends=True) if raw.endswith(b"\n")]


def _created_at(run_json: bytes) -> Any:
    """The time that identifies a run; None when this is not the content of a run.json."""
    try:
        return orjson.loads(run_json)["created_at"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
