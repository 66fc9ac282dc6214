"""manifest.jsonl: one line a sealed shard, in the order of sealing; the last one says `final`.

A `flush` line stands where a stream of seeds came to its end: from there on, contexts that still
waited for distractors were assembled with what there was. It is part of what samples are a function of.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from streamsyn.errors import SinkError


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedShard:
    """What the manifest says of one sealed shard; `path` is relative to the run directory."""

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


class Manifest:
    """The manifest of a run directory: read once, appended to line by line, each line synced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()  # contexts and samples are sealed by different threads
        self.shards: list[SealedShard] = []
        self.flushes: list[int] = []
        """Numbers of contexts at which a stream ended."""
        self.final: dict[str, Any] | None = None
        self.good_bytes = 0
        """Bytes of whole lines."""
        self.on_line: Callable[[Any], None] | None = None
        """Called with each line that has been appended; must not block."""
        if path.exists():
            self._read()

    def of_kind(self, kind: str) -> list[SealedShard]:
        """The shards of one kind, in order."""
        return [shard for shard in self.shards if shard.kind == kind]

    @property
    def torn_bytes(self) -> int:
        """Bytes of an unfinished last line."""
        return self._path.stat().st_size - self.good_bytes if self._path.exists() else 0

    def cut_torn_line(self) -> None:
        """Remove what a kill left of a line that was being written."""
        if self.torn_bytes:
            os.truncate(self._path, self.good_bytes)

    def add_shard(self, shard: SealedShard) -> None:
        """Append the line of a shard that has just been sealed."""
        with self._lock:
            self._append(shard)
            self.shards.append(shard)
            self.final = None

    def add_flush(self, contexts: int) -> None:
        """Note that the stream ended after so many contexts."""
        with self._lock:
            self._append({"flush": True, "contexts": contexts})
            self.flushes.append(contexts)
            self.final = None

    def add_final(self, line: dict[str, Any]) -> None:
        """Note that every seed has its outcome and every sample is written."""
        with self._lock:
            self._append({"final": True, **line})
            self.final = line

    def _append(self, line: Any) -> None:
        data = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
        self.cut_torn_line()  # a disk that was full has room again: no line must join half a line
        with self._path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.good_bytes += len(data)
        if self.on_line is not None:
            self.on_line(line)

    def _read(self) -> None:
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    self._take(orjson.loads(line))
                except orjson.JSONDecodeError as error:
                    if not file.read(1):
                        return  # a power loss may keep the end of the last line without its beginning
                    raise self._refuse(number, error) from error
                except (AttributeError, ValueError, TypeError, KeyError) as error:
                    raise self._refuse(number, error) from error
                self.good_bytes += len(line)

    def _refuse(self, number: int, error: Exception) -> SinkError:
        return SinkError(f"{self._path}:{number} is no line of a manifest: {error}")

    def _take(self, line: dict[str, Any]) -> None:
        self.final = None
        if line.get("final"):
            self.final = line
        elif line.get("flush"):
            self.flushes.append(int(line["contexts"]))
        else:
            self.shards.append(SealedShard(**line))
