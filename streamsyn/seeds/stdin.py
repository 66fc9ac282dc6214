"""Seeds from a pipe. It cannot be read twice, so what is read is on disk before it is acted on."""

import os
import re
import select
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import orjson

from streamsyn.config.sections import SeedsSection
from streamsyn.errors import ConfigError
from streamsyn.io.content import HEAD_BYTES, Layout, is_compressed, layout_of, problem_of
from streamsyn.io.rows import Line, LineSplitter
from streamsyn.io.spool import Spool
from streamsyn.records import BadSeed, Entry, RejectReason, Seed
from streamsyn.seeds.forms import FormsSeen
from streamsyn.seeds.parse import SeedParser

_CHUNK_BYTES: Final = 256 * 1024
_ARRAY_OF_OBJECTS: Final = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{")
PIPE_NAME: Final = "-"
"""The name of the pipe in the origin of an entry, as in `-:17`."""


class StdinSource:
    """NDJSON on a file descriptor; `stop` ends a read that waits for more.

    Args:
        fd: The file descriptor.
        task: The task of seeds that name none; by default `stdin`.
        seeds: The section of the configuration.
        takes_documents: Whether a seed is a document instead of a pair.
        seen: Counts the forms of rows.
    """

    def __init__(
        self,
        fd: int,
        task: str | None,
        seeds: SeedsSection,
        *,
        takes_documents: bool = False,
        seen: FormsSeen | None = None,
    ) -> None:
        self._fd = fd
        self._task = task or "stdin"
        self._max_line_bytes = seeds.max_line_bytes
        self._parser = SeedParser(seeds.fields, form=seeds.format, takes_documents=takes_documents, seen=seen)
        self._wake_read, self._wake_write = os.pipe()
        weakref.finalize(self, _close, self._wake_read, self._wake_write)  # `stop` may be called until then
        self._stopped = False

    def batches(self) -> Iterator[list[Entry]]:
        splitter = LineSplitter(self._max_line_bytes)
        is_first = True
        while chunk := self._read():
            if is_first:
                _check_beginning(chunk)
                is_first = False
            yield self._entries(splitter.feed(chunk))
        if not self._stopped:  # otherwise the last line may be incomplete
            yield self._entries(splitter.finish())

    def fraction(self) -> float | None:
        return None

    def stop(self) -> None:
        """End `batches`, from any thread."""
        self._stopped = True
        os.write(self._wake_write, b"x")

    def _read(self) -> bytes:
        # `select` waits for data or for `stop`; `read` then returns at once with what has arrived.
        ready, _, _ = select.select([self._fd, self._wake_read], [], [])
        try:
            return b"" if self._wake_read in ready else os.read(self._fd, _CHUNK_BYTES)
        except OSError as error:
            raise ConfigError(f"stdin cannot be read: {error.strerror}") from error

    def _entries(self, lines: Iterable[Line]) -> list[Entry]:
        parsed = [self._parser.line(line, PIPE_NAME, self._task, self._max_line_bytes) for line in lines]
        return [entry for entry in parsed if entry is not None]


def _check_beginning(chunk: bytes) -> None:
    """Refuse what is not one value a line, before it becomes one reject a line.

    Raises:
        ConfigError: It is compressed, of a different encoding, an array, or an object over several lines.
    """
    # The chunk may end within a character: whole lines alone say how they are encoded.
    problem = problem_of(chunk[:HEAD_BYTES].rpartition(b"\n")[0])
    if is_compressed(chunk):
        problem = "is compressed; unpack it first, for example with zcat"
    elif _ARRAY_OF_OBJECTS.match(chunk) and layout_of(chunk[:HEAD_BYTES]) is Layout.ARRAY:
        problem = "is a JSON array; give the file with --seeds PATH, or one object a line (jq -c '.[]')"
    if problem is not None:
        raise ConfigError(f"seeds: stdin {problem}")


class SeedSpool:
    """The entries that were read from a pipe, in OUT/spool/stdin.jsonl, in the order in which they came."""

    def __init__(self, folder: Path) -> None:
        self._spool: Spool[Entry] = Spool(folder / "stdin.jsonl", _decode)

    def exists(self) -> bool:
        """Whether an earlier run has read a pipe."""
        return self._spool.exists()

    def replay(self) -> Iterator[list[Entry]]:
        """The entries that earlier runs have read. A torn last line was not acted on: it is cut off.

        Raises:
            SinkError: A line is damaged that is not the last one; nothing is cut.
        """
        return self._spool.replay()

    def follow(
        self, batches: Iterator[list[Entry]], is_known: Callable[[Entry], bool]
    ) -> Iterator[list[Entry]]:
        """Pass `batches` on, each once its new entries are on disk.

        Raises:
            SinkError: They cannot be written.
        """
        with self._spool:
            for batch in batches:
                new = b"".join(_encode(entry) for entry in batch if not is_known(entry))
                if new:
                    self._spool.append(new)
                yield batch


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def _encode(entry: Entry) -> bytes:
    kind = "seed" if isinstance(entry, Seed) else "bad"
    return orjson.dumps({kind: entry}, default=bytes.hex, option=orjson.OPT_APPEND_NEWLINE)


def _decode(line: bytes) -> Entry | None:
    try:
        kind, fields = orjson.loads(line).popitem()
        if kind == "seed":
            return Seed(**fields)
        reason = RejectReason(fields["reason"])
        return BadSeed(fields["origin"], reason, fields["detail"], bytes.fromhex(fields["key"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
