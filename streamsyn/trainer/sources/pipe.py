"""Samples from a pipe. It cannot be read twice, so what is read is on disk before it is trained on."""

import asyncio
import os
import select
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import orjson
import structlog

from streamsyn.errors import ConfigError, SinkError
from streamsyn.io.rows import Line, LineSplitter
from streamsyn.io.spool import Spool
from streamsyn.records import digest
from streamsyn.sink.completed_keys import Claim, Claims
from streamsyn.trainer.examples import BadRow, Row

log = structlog.get_logger()

MAX_LINE_BYTES: Final = 64 * 2**20
"""A longer line is dropped without being held in memory."""
_CHUNK_BYTES: Final = 256 * 1024
_SYNC_BYTES: Final = 16 * _CHUNK_BYTES
"""At most this much is read from the pipe before it is synced to disk."""


class PipedSamples:
    """Source: NDJSON on a file descriptor, by way of the spool file that holds what was read from it so far.

    The pipe is read only when everything in the file has been fetched: a slow trainer slows the writer. A
    line that is not a JSON object becomes a row with a problem. Duplicates, of earlier runs too, are skipped:
    piping the same samples again changes nothing. Samples are the same if their id and their messages are;
    the id alone does not count, because ids in different files may be equal.

    Args:
        folder: The folder of the spool file: OUT/spool.
        fd: The file descriptor; None ends the stream where the spool file ends.
    """

    name = "stdin"

    def __init__(self, folder: Path, fd: int | None) -> None:
        self._spool = Spool(folder / "samples.jsonl", _decoded)
        self._fd = fd
        self._splitter = LineSplitter(MAX_LINE_BYTES)
        self._claims: Claims | None = None
        self._ended = fd is None
        self._repeated = 0
        self._rows = 0
        self._place = (0, 0)
        """A row, and the offset in the spool file at which it begins."""

    def fetch(self, first: int, limit: int) -> list[Row]:
        self._open()
        if first >= self._rows and not self._ended:
            self._spool_pipe()
        return self._read(first, min(limit, self._rows - first)) if first < self._rows else []

    def total(self) -> int | None:
        self._open()
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
        except PermissionError:  # a regular file: all of it is there
            return
        try:
            async with asyncio.timeout(timeout_s):
                await readable.wait()
        except TimeoutError:
            return
        finally:
            loop.remove_reader(self._fd)

    def close(self) -> None:
        self._spool.close()
        if self._claims is not None:
            self._claims.close()
            self._claims = None

    def _open(self) -> None:
        """Replay what earlier runs have read, once."""
        if self._claims is not None:
            return
        self._spool.open()
        claims = Claims(None, self._spool.path.with_name("ids.sqlite"))
        rows = 0
        try:
            with claims.batch():
                for batch in self._spool.replay():
                    for entry in batch:
                        claims.claim(bytes.fromhex(entry["key"]))
                    rows += len(batch)
        except BaseException:
            claims.close()
            self._spool.close()
            raise
        self._rows, self._claims = rows, claims

    def _spool_pipe(self) -> None:
        """Move what the pipe holds by now to the spool file."""
        new, size = [], 0
        while size < _SYNC_BYTES and (chunk := self._read_pipe()) is not None:
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
        self._spool.append(b"".join(new))
        self._rows += len(new)

    def _read_pipe(self) -> bytes | None:
        """What has arrived; None if nothing has, b"" at the end."""
        assert self._fd is not None
        try:
            ready, _, _ = select.select([self._fd], [], [], 0)
            return os.read(self._fd, _CHUNK_BYTES) if ready else None
        except OSError as error:
            raise ConfigError(f"stdin cannot be read: {error.strerror}") from error

    def _new(self, lines: Iterable[Line]) -> list[bytes]:
        """The lines of the spool file for those lines of the pipe that were not read before."""
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
        for line in self._spool.lines(offset):
            if row >= first:
                entry = _decoded(line)
                if entry is None:
                    raise SinkError(f"{self._spool.path}: row {row} (counted from 0) is damaged")
                found.append(entry["row"] if "row" in entry else BadRow(entry["bad"]))
            row += 1
            offset += len(line)
            if len(found) == limit:
                break
        self._place = (row, offset)
        return found


def _entry(line: Line) -> dict[str, Any] | None:
    """The entry of the spool file for a line: its row, or what is wrong with it; None for a blank line."""
    if line.text is None:
        problem = f"is longer than {MAX_LINE_BYTES} bytes"
    elif not line.text or line.text.isspace():
        return None
    else:
        try:
            row = orjson.loads(line.text)
        except orjson.JSONDecodeError as error:
            problem = f"is not valid JSON: {error}"
        else:
            if isinstance(row, dict):
                named = row.get("id")
                key = _sample_key(named, row) if isinstance(named, str) else digest("row", line.text)
                return {"key": key.hex(), "row": row}
            problem = f"is not a JSON object but {type(row).__name__}"
    key = digest("bad", str(line.number), line.text or b"")
    return {"key": key.hex(), "bad": f"line {line.number} of stdin {problem}"}


def _sample_key(named: str, row: dict[str, Any]) -> bytes:
    """The key of a sample with an id. Fields that are not trained on do not count: they may change."""
    content = row.get("messages", row)
    return digest("sample", named, orjson.dumps(content, option=orjson.OPT_SORT_KEYS))


def _decoded(line: bytes) -> dict[str, Any] | None:
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("key"), str) else None
