"""Samples from a pipe. It cannot be read twice, so what is read is on disk before it is acted on."""

import asyncio
import os
import select
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import structlog

from streamsyn.errors import ConfigError, SinkError
from streamsyn.io.durable import sync_folder
from streamsyn.io.lines import Line, LineSplitter
from streamsyn.records import digest
from streamsyn.sink.completed_keys import Claim, Claims
from streamsyn.trainer.examples import Row

log = structlog.get_logger()

CHUNK_BYTES = 256 * 1024
_AT_ONCE_BYTES = 16 * CHUNK_BYTES
"""So much is read from the pipe at once, and synced together."""
MAX_LINE_BYTES = 64 * 2**20
"""A longer line is dropped without being held in memory."""


class PipedSamples:
    """Source: NDJSON on a file descriptor, by way of a file that holds what was read from it so far.

    The pipe is read only when everything in the file has been fetched: a slow trainer slows the writer. A
    line that is no JSON object is a row that says so. A sample that has been read before, by an earlier run
    too, is passed over: piping the same again changes nothing. It is the same when its id and its messages
    are: ids in different files may be equal.

    Args:
        folder: Where to keep the file: OUT/spool.
        fd: What to read from; None ends the stream where the file ends.
    """

    name = "stdin"

    def __init__(self, folder: Path, fd: int | None) -> None:
        self._path = folder / "samples.jsonl"
        self._fd = fd
        self._splitter = LineSplitter(MAX_LINE_BYTES)
        self._claims: Claims | None = None
        self._ended = fd is None
        self._repeated = 0
        self._rows = 0
        self._bytes = 0
        """Of whole rows in the file."""
        self._place = (0, 0)
        """A row, and the offset at which it begins."""

    def fetch(self, first: int, limit: int) -> list[Row]:
        try:
            self._open()
            if first >= self._rows and not self._ended:
                self._take_in()
            return self._read(first, min(limit, self._rows - first)) if first < self._rows else []
        except OSError as error:
            raise SinkError(f"cannot use {self._path}: {error.strerror}") from error

    def total(self) -> int | None:
        try:
            self._open()
        except OSError as error:
            raise SinkError(f"cannot use {self._path}: {error.strerror}") from error
        return self._rows if self._ended else None

    def pick(self, seqs: Sequence[int]) -> Iterator[Row]:
        for seq in seqs:
            yield from self.fetch(seq, 1)

    async def changed(self, timeout_s: float) -> None:
        if self._fd is None:
            return
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        try:
            loop.add_reader(self._fd, readable.set)
        except PermissionError:  # a file: all of it is there
            return
        try:
            async with asyncio.timeout(timeout_s):
                await readable.wait()
        except TimeoutError:
            return
        finally:
            loop.remove_reader(self._fd)

    def close(self) -> None:
        if self._claims is not None:
            self._claims.close()
            self._claims = None

    def _open(self) -> None:
        """Take up what earlier runs have read; a torn last line was not acted on, and is cut off."""
        if self._claims is not None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        claims = Claims(None, self._path.with_name("ids.sqlite"))
        with self._path.open("ab+") as file, claims.batch():
            file.seek(0)
            for number, line in enumerate(file, 1):
                entry = _decoded(line)
                if entry is None:
                    if file.readline():  # what lies behind was acted on, and cannot be piped again
                        raise SinkError(f"{self._path}:{number} is damaged; mend or delete that line")
                    break
                claims.claim(bytes.fromhex(entry["key"]))
                self._rows += 1
                self._bytes += len(line)
            file.truncate(self._bytes)
        sync_folder(
            self._path.parent
        )  # else a power cut may lose a new file, however well it is synced itself
        self._claims = claims

    def _take_in(self) -> None:
        """Move what the pipe holds by now to the file."""
        new, size = [], 0
        while size < _AT_ONCE_BYTES and (chunk := self._read_pipe()) is not None:
            size += len(chunk)
            new += self._new(self._splitter.feed(chunk))
            if not chunk:
                new += self._new(self._splitter.finish())
                self._ended = True
                if self._repeated:
                    log.info("stdin.repeats_passed_over", rows=self._repeated)
                break
        if not new:
            return
        with self._path.open("ab", buffering=0) as file:
            try:
                left = memoryview(b"".join(new))
                self._bytes += len(left)
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError as error:
                raise SinkError(f"cannot write {self._path}: {error.strerror}") from error
        self._rows += len(new)

    def _read_pipe(self) -> bytes | None:
        """What is there; None when nothing is, b"" at the end."""
        assert self._fd is not None
        try:
            ready, _, _ = select.select([self._fd], [], [], 0)
            return os.read(self._fd, CHUNK_BYTES) if ready else None
        except OSError as error:
            raise ConfigError(f"stdin cannot be read: {error.strerror}") from error

    def _new(self, lines: Iterable[Line]) -> list[bytes]:
        """Lines for the file, of those that were not read before."""
        assert self._claims is not None
        entries = [entry for line in lines if (entry := _entry(line)) is not None]
        if not entries:
            return []
        with self._claims.batch():
            new = [one for one in entries if self._claims.claim(bytes.fromhex(one["key"])) is Claim.NEW]
        self._repeated += len(entries) - len(new)
        return [orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE) for entry in new]

    def _read(self, first: int, limit: int) -> list[Row]:
        row, offset = self._place if self._place[0] <= first else (0, 0)
        found: list[Row] = []
        with self._path.open("rb") as file:
            file.seek(offset)
            while len(found) < limit:
                line = file.readline()
                if row >= first:
                    entry = _decoded(line)
                    if entry is None:
                        raise SinkError(f"{self._path}: row {row} (counted from 0) is damaged")
                    found.append(Row(row, entry.get("row"), entry.get("bad", "")))
                row += 1
                offset += len(line)
        self._place = (row, offset)
        return found


def _entry(line: Line) -> dict[str, Any] | None:
    """What the file says of a line: its row, or what is wrong with it; None for a blank one."""
    if line.text is None:
        problem = f"longer than {MAX_LINE_BYTES} bytes"
    elif not line.text or line.text.isspace():
        return None
    else:
        try:
            row = orjson.loads(line.text)
        except orjson.JSONDecodeError as error:
            problem = f"no JSON: {error}"
        else:
            if isinstance(row, dict):
                named = row.get("id")
                key = _sample_key(named, row) if isinstance(named, str) else digest("row", line.text)
                return {"key": key.hex(), "row": row}
            problem = f"no JSON object but {type(row).__name__}"
    key = digest("bad", str(line.number), line.text or b"")
    return {"key": key.hex(), "bad": f"line {line.number} of stdin is {problem}"}


def _sample_key(named: str, row: dict[str, Any]) -> bytes:
    """Of a sample with an id. What else is in a row may change on its way here, and is not trained on."""
    content = row.get("messages", row)
    return digest("sample", named, orjson.dumps(content, option=orjson.OPT_SORT_KEYS))


def _decoded(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("key"), str) else None
