"""Seeds from a pipe. It cannot be read twice, so what is read is on disk before it is acted on."""

import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from streamsyn.config.sections import SeedsSection
from streamsyn.errors import ConfigError, SinkError
from streamsyn.io.lines import LineSplitter
from streamsyn.records import BadSeed, Entry, RejectReason, Seed
from streamsyn.seeds.parse import SeedParser

CHUNK_BYTES = 256 * 1024
BATCH_LINES = 256


class StdinSource:
    """NDJSON on a file descriptor; `stop` ends a read that waits for more."""

    def __init__(
        self, fd: int, task: str | None, seeds: SeedsSection, *, takes_documents: bool = False
    ) -> None:
        self._fd = fd
        self._task = task or "stdin"
        self._max_line_bytes = seeds.max_line_bytes
        self._parser = SeedParser(seeds.fields, takes_documents=takes_documents)
        self._wake_read, self._wake_write = os.pipe()
        self._stopped = False

    def batches(self) -> Iterator[list[Entry]]:
        splitter = LineSplitter(self._max_line_bytes)
        while chunk := self._read():
            yield self._entries(splitter.feed(chunk))
        if not self._stopped:  # else the last line may be half a one
            yield self._entries(splitter.finish())

    def fraction(self) -> float | None:
        return None

    def stop(self) -> None:
        """End `batches`, from any thread."""
        self._stopped = True
        os.write(self._wake_write, b"x")

    def _read(self) -> bytes:
        # Waiting in `select` rather than in `read` is what lets `stop` through; and once it says
        # that there is something, `read` returns at once with what there is.
        ready, _, _ = select.select([self._fd, self._wake_read], [], [])
        try:
            return b"" if self._wake_read in ready else os.read(self._fd, CHUNK_BYTES)
        except OSError as error:
            raise ConfigError(f"stdin cannot be read: {error.strerror}") from error

    def _entries(self, lines: Iterator[Any]) -> list[Entry]:
        parsed = [self._parser.line(line, "-", self._task, self._max_line_bytes) for line in lines]
        return [entry for entry in parsed if entry is not None]


class Spool:
    """The file in OUT/spool/ that holds what was read from a pipe, in the order in which it came."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "stdin.jsonl"

    def exists(self) -> bool:
        """Whether an earlier run has read a pipe."""
        return self._path.exists()

    def replay(self) -> Iterator[list[Entry]]:
        """What earlier runs have read. A torn last line was not acted on: it is cut off.

        Raises:
            SinkError: A line is damaged that is not the last one; nothing is cut.
        """
        if not self._path.exists():
            return
        batch: list[Entry] = []
        end = begin = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                entry = _decode(line)
                if entry is None:
                    if file.readline():  # what lies behind was acted on, and cannot be piped again
                        raise SinkError(f"{self._path}:{number} is damaged; mend or delete that line")
                    break
                end += len(line)
                batch.append(entry)
                if len(batch) == BATCH_LINES or end - begin >= CHUNK_BYTES:
                    yield batch
                    batch, begin = [], end
        if end < self._path.stat().st_size:
            os.truncate(self._path, end)
        yield batch

    def follow(
        self, batches: Iterator[list[Entry]], is_known: Callable[[Entry], bool]
    ) -> Iterator[list[Entry]]:
        """Pass `batches` on, each one when those of its entries that are new are on disk."""
        with self._open() as file:
            for batch in batches:
                new = b"".join(_encode(entry) for entry in batch if not is_known(entry))
                if new:
                    self._append(file.fileno(), new)
                yield batch

    def _open(self) -> IO[bytes]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = self._path.open("ab", buffering=0)
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)  # else a power cut may lose a new file, however well it is synced itself
            finally:
                os.close(folder)
        except OSError as error:
            raise SinkError(f"cannot write {self._path}: {error.strerror}") from error
        return file

    def _append(self, fd: int, data: bytes) -> None:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        except OSError as error:
            raise SinkError(f"cannot write {self._path}: {error.strerror}") from error


def _encode(entry: Entry) -> bytes:
    kind = "seed" if isinstance(entry, Seed) else "bad"
    return orjson.dumps({kind: entry}, default=bytes.hex) + b"\n"


def _decode(line: bytes) -> Entry | None:
    if not line.endswith(b"\n"):
        return None
    try:
        kind, fields = orjson.loads(line).popitem()
        if kind == "seed":
            return Seed(**fields)
        reason = RejectReason(fields["reason"])
        return BadSeed(fields["origin"], reason, fields["detail"], bytes.fromhex(fields["key"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
