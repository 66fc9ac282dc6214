"""What of a run directory is to be copied to its mirror, in which order, and what is there already."""

import hashlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import structlog

from streamsyn.errors import ConfigError, SinkError
from streamsyn.io.durable import write_whole
from streamsyn.io.remote import names_below, open_url
from streamsyn.sink import shards
from streamsyn.sink.shards import KINDS

log = structlog.get_logger()


class CopyMismatch(SinkError):
    """Raised when what is read back is not what was written."""


class MirrorTarget:
    """A folder behind a URL. Every method may block, and may raise whatever its file system raises.

    Raises:
        ConfigError: There is no such protocol, or its package is missing.
    """

    def __init__(self, url: str) -> None:
        self._filesystem, self._path = open_url(url, "sink.mirror")

    def refuse_inside(self, root: Path) -> None:
        """A mirror within the directory that it is of would be no copy.

        Raises:
            ConfigError: It is there.
        """
        from fsspec.implementations.local import LocalFileSystem

        if isinstance(self._filesystem, LocalFileSystem):
            place = Path(self._path).resolve()
            if place.is_relative_to(root.resolve()):
                raise ConfigError(f"sink.mirror: {place} lies in the run directory itself")

    def sizes(self, folder: str) -> dict[str, int]:
        """Sizes of the files in a folder, by their path below the mirror."""
        below = names_below(self._filesystem, f"{self._path}/{folder}")
        return {f"{folder}/{name}": size for name, size in below.items()}

    def read(self, name: str) -> bytes | None:
        """A small file; None when there is none."""
        self._filesystem.invalidate_cache()
        try:
            return b"".join(self._chunks(name))
        except FileNotFoundError:
            return None

    def holds(self, name: str, size: int, sha256: str) -> bool:
        """Whether a file is there and is this one, by reading it."""
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
            NotTheSame: What is there now is something else.
        """
        self._make_folder(name)
        self._filesystem.put_file(str(path), f"{self._path}/{name}")
        if not self.holds(name, size, sha256):
            raise CopyMismatch(f"{name} was not read back as it was written")

    def put(self, name: str, data: bytes) -> None:
        """Write a small file whole, and read it back.

        Raises:
            NotTheSame: What is there now is something else.
        """
        self._make_folder(name)
        self._filesystem.pipe_file(f"{self._path}/{name}", data)
        if self.read(name) != data:
            raise CopyMismatch(f"{name} was not read back as it was written")

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self._filesystem.isfile(f"{self._path}/{name}"):
            self._filesystem.rm_file(f"{self._path}/{name}")

    def _make_folder(self, name: str) -> None:
        self._filesystem.makedirs(f"{self._path}/{name}".rpartition("/")[0], exist_ok=True)

    def _chunks(self, name: str) -> Iterator[bytes]:
        with self._filesystem.open(f"{self._path}/{name}", "rb") as file:
            while chunk := file.read(shards.CHUNK_BYTES):
                yield chunk


Line = dict[str, Any]
_MANIFEST = "manifest.jsonl"
_RUN = "run.json"


class MirrorPlan:
    """Copies sealed shards, lists each once it is there. For one thread; `missing` for any.

    At any time the mirror is a run directory that `verify` finds sound, of an earlier moment: its manifest
    lists what is there, and of samples only those whose contexts are there.

    Args:
        root: The run directory.
        url: Where to copy it to.
        stopped: Once set, no more is begun, and nothing here is touched.

    Raises (all methods):
        ConfigError: The mirror cannot be used, ever.
        Exception: Whatever its file system raises; to be tried again.
    """

    def __init__(self, root: Path, url: str, stopped: threading.Event) -> None:
        self._root = root
        self._url = url
        self._stopped = stopped
        self._replica: MirrorTarget | None = None
        self._lines: list[tuple[bytes, Line]] = []
        self._read_bytes = 0
        self._copied: dict[str, str] = {}
        """The sha256 of each shard that is there."""
        self._contexts = 0
        """Contexts in them."""
        self._listed: set[str] = set()
        """Shards that the mirror's manifest listed when we came."""
        self._put: dict[str, bytes] = {}
        """What we have written of run.json and the manifest."""

    def connect(self) -> MirrorTarget:
        """The mirror."""
        if self._replica is None:
            replica = MirrorTarget(self._url)
            replica.refuse_inside(self._root)
            self._replica = replica
        return self._replica

    def begin(self) -> None:
        """Find out what is there."""
        replica = self.connect()
        self._refuse_other_run(replica)
        far = [raw for raw in (replica.read(_MANIFEST) or b"").splitlines(keepends=True) if raw[-1:] == b"\n"]
        self._read_lines()
        here = {raw for raw, _ in self._lines}
        gone = [orjson.loads(raw) for raw in far if raw not in here]
        if any(line.get("kind") in ("contexts", "rejects") for line in gone):
            raise ConfigError(
                f"sink.mirror: {self._url} holds shards that {self._root} does not: restore them from there"
            )
        if gone:  # `verify --repair` has dropped samples
            replica.put(_MANIFEST, b"".join(raw for raw in far if raw in here))
            for path in filter(None, (line.get("path") for line in gone)):
                replica.remove(path)
        there = set(far)
        self._listed = {line["path"] for raw, line in self._lines if "path" in line and raw in there}
        self._recall(replica)

    def copy(self, needed: Mapping[str, int]) -> None:
        """Copy all that is due.

        Args:
            needed: Contexts that must be there before a shard of samples may be: those that the log held
                when it was sealed. One that is not named waits.
        """
        replica = self.connect()
        self._read_lines()
        while self._copy_some(replica, needed):  # contexts that have come make samples due
            pass
        self._list(replica)

    @property
    def copied(self) -> int:
        """Shards that are there."""
        return len(self._copied)

    def missing(self, needed: Mapping[str, int]) -> list[str]:
        """What is due and not there; of a manifest that was read a while ago, what it says by now."""
        copied, lines = dict(self._copied), _lines(self._here(_MANIFEST))
        shards = [line for _, line in lines if "path" in line]
        missing = [one["path"] for one in shards if one["path"] not in copied and self._is_due(one, needed)]
        is_behind = bool(shards) and self._put.get(_MANIFEST) != self._due_lines(lines)
        return missing or ([_MANIFEST] if is_behind else [])

    def _copy_some(self, replica: MirrorTarget, needed: Mapping[str, int]) -> bool:
        """Copy what is due, in order; whether that was anything."""
        copied, held = False, False
        for _, line in self._lines:
            path = line.get("path")
            if path is None or path in self._copied or (held and line["kind"] == "samples"):
                continue
            if not self._is_due(line, needed):
                held = True  # and those behind it: the mirror has no gaps
                continue
            if self._stopped.is_set():
                return False
            replica.copy(self._root / path, path, line["bytes"], line["sha256"])
            self._take(line)
            self._remember()
            log.debug("mirror.copied", path=path, bytes=line["bytes"])
            self._list(replica)
            copied = True
        return copied

    def _is_due(self, line: Line, needed: Mapping[str, int]) -> bool:
        if line["kind"] != "samples" or line["path"] in self._listed:
            return True
        return needed.get(line["path"], self._contexts + 1) <= self._contexts

    def _recall(self, replica: MirrorTarget) -> None:
        """Take for copied what an earlier run has verified, or what is verified now."""
        known = self._verified_before()
        sizes = {name: size for kind in KINDS for name, size in replica.sizes(kind).items()}
        for _, line in self._lines:
            if self._stopped.is_set():
                return
            path = line.get("path")
            if path is None or sizes.get(path) != line["bytes"]:
                continue
            if known.get(path) == line["sha256"] or replica.holds(path, line["bytes"], line["sha256"]):
                self._take(line)
        self._remember()

    def _take(self, line: Line) -> None:
        self._copied[line["path"]] = line["sha256"]
        if line["kind"] == "contexts":
            self._contexts += line["rows"]

    def _refuse_other_run(self, replica: MirrorTarget) -> None:
        far = replica.read(_RUN)
        if far is not None and _created_at(far) != _created_at(self._here(_RUN)):
            raise ConfigError(
                f"sink.mirror: {self._url} holds another run than {self._root}; copy it back to go on with it"
            )

    def _list(self, replica: MirrorTarget) -> None:
        """Bring run.json and the manifest up to what is there, the manifest last."""
        if _RUN not in self._put:
            self._refuse_other_run(replica)  # it may have begun when we did
        due = self._due_lines(self._lines)
        for name, data in ((_RUN, self._here(_RUN)), (_MANIFEST, due)):
            if data and self._put.get(name) != data and not self._stopped.is_set():
                replica.put(name, data)
                self._put[name] = data

    def _due_lines(self, lines: list[tuple[bytes, Line]]) -> bytes:
        """The manifest, less what is not there."""
        kept = []
        for raw, line in lines:
            if "path" in line:
                is_there = line["path"] in self._copied
            elif line.get("flush"):
                is_there = line["contexts"] <= self._contexts
            else:  # the final line: all that it counts must be there
                is_there = all(one["path"] in self._copied for _, one in lines if "path" in one)
            if is_there:
                kept.append(raw)
        return b"".join(kept)

    def _read_lines(self) -> None:
        """Read what has come to the manifest."""
        new = _lines(self._here(_MANIFEST)[self._read_bytes :])
        self._lines += new
        self._read_bytes += sum(len(raw) for raw, _ in new)

    def _here(self, name: str) -> bytes:
        path = self._root / name
        return path.read_bytes() if path.exists() else b""

    @property
    def _state(self) -> Path:
        return self._root / "index" / "mirror.json"

    def _verified_before(self) -> dict[str, str]:
        """What an earlier run has verified at this place; nothing when that is lost: it is verified again."""
        try:
            state = orjson.loads(self._state.read_bytes())
            return dict(state["shards"]) if state["url"] == self._url else {}
        except (OSError, orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            return {}

    def _remember(self) -> None:
        if not self._stopped.is_set():
            write_whole(self._state, orjson.dumps({"url": self._url, "shards": self._copied}))


def _lines(data: bytes) -> list[tuple[bytes, Line]]:
    """Whole lines of a manifest."""
    return [(raw, orjson.loads(raw)) for raw in data.splitlines(keepends=True) if raw.endswith(b"\n")]


def _created_at(run_json: bytes) -> Any:
    """By which a run is known; None when that is no run.json."""
    try:
        return orjson.loads(run_json)["created_at"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
