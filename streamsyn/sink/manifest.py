"""manifest.jsonl: one line for each sealed shard, in the order of sealing, and a final line at the end.

A `flush` line records that a stream of seeds ended after N contexts: there, contexts that still waited for
distractors were assembled with what there was. So samples are a function of the log and of these lines.

Each line names the epoch of its process (`streamsyn.sink.epoch`), where there is one. A line of an older
epoch behind one of a newer epoch is ignored.

A `retry` line records that rejects are to be asked again. It is open until the next final line.

removed.json beside it has the number of samples that retention has removed: whole shards, the oldest first,
once a mirror has them. The manifest still lists them, so no number changes. The file is written before the
shards are deleted: a listed shard that is missing is damage, unless this file covers it.
"""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import orjson

from streamsyn.errors import SinkError
from streamsyn.io.durable import disk_errors, sync_folder, write_whole
from streamsyn.sink.epoch import Epoch

_REMOVED = "removed.json"
_REMOVED_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedShard:
    """The manifest's entry for one sealed shard; `path` is relative to the run directory."""

    kind: str
    path: str
    rows: int
    bytes: int
    sha256: str
    first_seq: int
    last_seq: int
    tokens: dict[str, int]
    model: str
    sealed_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """The manifest's entry for `streamsyn retry`: which rejects are to be asked again.

    Attributes:
        reasons: The reasons of the rejects.
        contexts: Contexts in the log at that time: later ones may supersede a reject.
        rejects: Rejects in the log at that time: these are asked again, and later ones may supersede them.
        seeds_read: Whether all seeds had been read, so that sources that are gone since hold nothing new.
        at: When, in Unix seconds.
    """

    reasons: list[str]
    contexts: int
    rejects: int
    seeds_read: bool
    at: float

    def allows(self, kind: str, seq: int, superseded: int) -> bool:
        """Whether row `seq` of contexts or rejects may supersede the reject `superseded`."""
        return superseded < self.rejects and seq >= (self.contexts if kind == "contexts" else self.rejects)

    def reopens(self, reject: dict[str, Any]) -> bool:
        """Whether a row of rejects is one of those to be asked again."""
        return bool(reject["seq"] < self.rejects) and reject.get("reason") in self.reasons


T = TypeVar("T", SealedShard, Retry)


class Manifest:
    """The manifest of a run directory: read once, then appended to; each line is synced.

    Args:
        path: The file.
        epoch: That of this process, to append; None only reads.

    Raises:
        SinkError: A line before the last one is invalid, or (all methods) the disk failed.
        TakenOver: A newer process writes to it; what was appended is not in the manifest.
    """

    def __init__(self, path: Path, epoch: Epoch | None = None) -> None:
        self._path = path
        self._epoch = epoch or Epoch(path.parent)
        self._newest_epoch = 0
        """The epoch of the last line."""
        self._file: int | None = None
        self._lock = threading.Lock()  # contexts and samples are sealed by different threads
        self.shards: list[SealedShard] = []
        self.flushes: list[int] = []
        """Numbers of contexts after which a stream of seeds ended."""
        self.retries: list[Retry] = []
        """All retries, in order."""
        self.open_retries: list[Retry] = []
        """Those since the last final line: some of their rejects may not have been asked again yet."""
        self.superseded = 0
        """Rejects that no longer held at the last final line."""
        self.final: dict[str, Any] | None = None
        self.good_bytes = 0
        """Size of the whole lines, without a torn last line."""
        self.on_line: Callable[[Any], None] | None = None
        """Called with each line after it was appended; must not block."""
        with disk_errors(f"read {path}"):
            if path.exists():
                self._read()

    def of_kind(self, kind: str) -> list[SealedShard]:
        """The shards of one kind, in order."""
        return [shard for shard in self.shards if shard.kind == kind]

    @property
    def seeds_read(self) -> bool:
        """Whether all seeds were read: the run was finished, before a retry that is open or now."""
        return self.final is not None or any(retry.seeds_read for retry in self.open_retries)

    @property
    def torn_bytes(self) -> int:
        """Size of a torn last line."""
        return self._path.stat().st_size - self.good_bytes if self._path.exists() else 0

    def cut_torn_line(self) -> None:
        """Open the file to append, and remove a torn last line, left by a kill."""
        with disk_errors(f"cut the torn last line of {self._path}"):
            self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            self._cut(self._file)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)

    def add_shard(self, shard: SealedShard) -> None:
        """Append the entry of a shard that has just been sealed."""
        with self._lock:
            self._append(shard)
            self.shards.append(shard)
            self.final = None

    def add_flush(self, contexts: int) -> None:
        """Record that the stream of seeds ended after this number of contexts."""
        with self._lock:
            self._append({"flush": True, "contexts": contexts})
            self.flushes.append(contexts)
            self.final = None

    def add_retry(self, retry: Retry) -> None:
        """Record that rejects are to be asked again."""
        with self._lock:
            self._append({"retry": True, **asdict(retry)})
            self._open(retry)

    def add_final(self, line: dict[str, Any]) -> None:
        """Record that every seed has its outcome and every sample is written."""
        with self._lock:
            self._append({"final": True, **line})
            self._close(line)

    def _append(self, line: Any) -> None:
        data = orjson.dumps(line)
        if self._epoch.number:
            data = b'%s,"epoch":%d}' % (data[:-1], self._epoch.number)
        data += b"\n"
        if self._file is None:
            self.cut_torn_line()
        assert self._file is not None, "opened"
        with disk_errors(f"write {self._path}"):
            self._cut(self._file)  # left by a disk that was full: no line may be joined to half a line
            left = memoryview(data)
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
            self._file = self._epoch.keep_name(self._file, self._path)
        self._epoch.check()
        self.good_bytes += len(data)
        if self.on_line is not None:
            self.on_line(line)

    def _cut(self, file: int) -> None:
        self._epoch.check()
        if os.fstat(file).st_size > self.good_bytes:
            os.ftruncate(file, self.good_bytes)

    def _read(self) -> None:
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    self._take(orjson.loads(line))
                except orjson.JSONDecodeError as error:
                    if not file.read(1):
                        return  # after a loss of power the last line may have its end and not its start
                    raise self._refuse(number, error) from error
                except (AttributeError, ValueError, TypeError, KeyError) as error:
                    raise self._refuse(number, error) from error
                self.good_bytes += len(line)

    def _refuse(self, number: int, error: Exception) -> SinkError:
        return SinkError(f"{self._path}:{number}: invalid manifest line: {error}")

    def _open(self, retry: Retry) -> None:
        self.final = None
        self.retries.append(retry)
        self.open_retries.append(retry)

    def _close(self, final: dict[str, Any]) -> None:
        self.final = final
        self.superseded = int(final.get("superseded", 0))
        self.open_retries = []

    def _take(self, line: dict[str, Any]) -> None:
        epoch = line.pop("epoch", 0)
        if epoch < self._newest_epoch:
            return
        self._newest_epoch = epoch
        self.final = None
        if line.get("final"):
            self._close(line)
        elif line.pop("retry", False):
            self._open(_known(Retry, line))
        elif line.get("flush"):
            self.flushes.append(int(line["contexts"]))
        else:
            self.shards.append(_known(SealedShard, line))


def _known(kind: type[T], line: dict[str, Any]) -> T:
    """A line as an entry of its kind.

    Raises:
        ValueError, TypeError: It has other keys.
    """
    if unknown := sorted(line.keys() - {field.name for field in fields(kind)}):
        raise ValueError(f"unknown {', '.join(unknown)}; a newer version of streamsyn may have written it")
    return kind(**line)


def removed_rows(root: Path) -> int:
    """Number of samples that were removed from a run directory: those with a smaller `seq`.

    Raises:
        SinkError: The file is damaged, or of a later format.
    """
    path = root / _REMOVED
    try:
        data = orjson.loads(path.read_bytes())
        if data["format"] != _REMOVED_FORMAT:
            raise SinkError(
                f"{path} has format {data['format']!r}; this streamsyn reads format {_REMOVED_FORMAT}"
            )
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
    write_whole(root / _REMOVED, orjson.dumps({"format": _REMOVED_FORMAT, "samples": rows}))
    with disk_errors(f"remove samples of {root}"):
        for shard in shards:
            (root / shard.path).unlink(missing_ok=True)
        sync_folder(root / "samples")
