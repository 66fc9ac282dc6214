"""The rows of a run as many readers share them: what is read and encoded once is sent to all.

Rows are read in pieces of about PIECE_BYTES, in threads. Readers at the same row share one read and one
piece, and a cache of bounded size keeps recent pieces for those close behind. A reader holds one piece at a
time, however slow it is, and a run without readers holds nothing.

A run that is hosted here tells when it has written (`RunTails.on_rows`), so nothing is polled.

The rows of a piece are encoded once for all readers that want the same form: NDJSON or server-sent events, as
they are or compressed. So a compressed piece depends on no other one: a zstd piece is a frame of its own (RFC
8878, 3), and a gzip piece is a sequence of deflate blocks that refer to nothing before them and end at a
whole byte (RFC 1951, 3.2). A connection adds what is its own: the header of the gzip member, and its trailer,
which has the checksum of all that was sent.
"""

import asyncio
import os
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import zstandard

from streamsyn.errors import SinkError
from streamsyn.following.run_rows import RunRows
from streamsyn.following.shard_lines import Cursor
from streamsyn.io.durable import disk_errors
from streamsyn.sink.manifest import Manifest
from streamsyn.sink.shards import CHUNK_BYTES, OPEN_SUFFIX

Framing = Literal["ndjson", "sse"]
Coding = Literal["identity", "gzip", "zstd"]

_GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
"""Deflate, no name, no time, unknown system (RFC 1952, 2.3)."""
_LAST_BLOCK = b"\x03\0"
"""An empty deflate block that is the last one."""
_GZIP_LEVEL = 1  # rows wait for this; level 6 takes four times as long for a seventh less
_ZSTD_LEVEL = 3
PIECE_BYTES = 128 * 2**10
"""A piece ends with the row, or the zstd frame of rows, that reaches this size."""
CACHE_BYTES = 16 * 2**20
"""Pieces kept for readers to come, of all runs together."""
_THREADS = 4
"""Threads that read, of their own: readers of a slow disk must not take those in which runs write."""
_LINGER_S = 50e-6
_LONGEST_LINGER_S = 0.1
"""Rows wait this long for each reader, so that sending to many leaves time for the runs."""
_NO_LIMIT = 2**62


@dataclass(frozen=True, slots=True)
class Encoded:
    """Some bytes of a stream.

    Attributes:
        body: What is sent.
        plain: The same before it was compressed.
    """

    body: bytes
    plain: bytes

    @property
    def size(self) -> int:
        """Bytes of memory that it takes."""
        return len(self.body) + (0 if self.plain is self.body else len(self.plain))


@dataclass(frozen=True, slots=True)
class RowForm:
    """A framing of rows, and the coding of its bytes."""

    framing: Framing = "ndjson"
    coding: Coding = "identity"

    def rows(self, first: int, lines: Sequence[bytes]) -> Encoded:
        """Encode rows.

        Args:
            first: The `seq` of the first one.
            lines: Each as its line of JSON, with the line end.
        """
        if self.framing == "ndjson":
            return self.text(b"".join(lines))
        return self.text(b"".join(b"id: %d\ndata: %s\n" % one for one in enumerate(lines, first)))

    def text(self, plain: bytes) -> Encoded:
        """Encode bytes that are framed already."""
        match self.coding:
            case "identity":
                return Encoded(plain, plain)
            case "zstd":
                return Encoded(zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(plain), plain)
            case "gzip":
                deflate = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
                return Encoded(deflate.compress(plain) + deflate.flush(zlib.Z_SYNC_FLUSH), plain)


class Envelope:
    """What one connection adds around the pieces it sends: the header and the trailer of a gzip member."""

    def __init__(self, coding: Coding) -> None:
        self._is_gzip = coding == "gzip"
        self._crc = 0
        self._size = 0

    def begin(self) -> bytes:
        """What is sent before the first piece."""
        return _GZIP_HEADER if self._is_gzip else b""

    def add(self, piece: Encoded) -> None:
        """Count a piece that is sent."""
        if self._is_gzip:
            self._crc = zlib.crc32(piece.plain, self._crc)
            self._size += len(piece.plain)

    def end(self) -> bytes:
        """What is sent after the last piece of a stream that is complete."""
        if not self._is_gzip:
            return b""
        return _LAST_BLOCK + self._crc.to_bytes(4, "little") + (self._size % 2**32).to_bytes(4, "little")


class RowLines(Protocol):
    """Where the rows of one kind are read; `RunRows` reads them from a run directory. Blocks."""

    def lines(self, first: int, limit: int, max_bytes: int, cursor: Cursor) -> list[bytes]:
        """The lines of rows from `first` on, with their ends; none if that is not written yet."""
        ...


@dataclass(frozen=True, slots=True)
class Position:
    """Where a reader is.

    Attributes:
        seq: The `seq` of the row that it needs next.
        cursor: Where that is on disk, or a place before it.
    """

    seq: int
    cursor: Cursor = field(default_factory=Cursor)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows in the form in which they are sent, and the position after them."""

    encoded: Encoded
    rows: int
    next: Position


_Key: TypeAlias = tuple["Tail", int, RowForm]


class PieceCache:
    """The pieces used last, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._pieces: OrderedDict[_Key, Piece] = OrderedDict()
        self.bytes = 0
        """Bytes of the pieces in it."""

    def get(self, key: _Key) -> Piece | None:
        """The piece that begins at this row, if it is in the cache."""
        if (piece := self._pieces.get(key)) is not None:
            self._pieces.move_to_end(key)
        return piece

    def put(self, key: _Key, piece: Piece) -> None:
        """Keep a piece, in place of those that were not used for the longest time."""
        self.bytes += piece.encoded.size - self._discard(key)
        self._pieces[key] = piece
        while self.bytes > self._max_bytes:
            _, oldest = self._pieces.popitem(last=False)
            self.bytes -= oldest.encoded.size

    def drop(self, tail: "Tail") -> None:
        """Forget the pieces of a tail."""
        for key in [key for key in self._pieces if key[0] is tail]:
            self.bytes -= self._discard(key)

    def _discard(self, key: _Key) -> int:
        piece = self._pieces.pop(key, None)
        return 0 if piece is None else piece.encoded.size


class Streams:
    """What the readers of all runs share: threads, the cache, and that the daemon is shutting down.

    Args:
        cache_bytes: Size of the cache.
    """

    def __init__(self, cache_bytes: int = CACHE_BYTES) -> None:
        self.cache = PieceCache(cache_bytes)
        self.threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="stream-read")
        self.tails: set[Tail] = set()
        """Those with readers."""
        self.is_closed = False

    @property
    def readers(self) -> int:
        """Number of readers."""
        return sum(tail.readers for tail in self.tails)

    def close(self) -> None:
        """End all streams: their readers connect again, to the next daemon."""
        self.is_closed = True
        for tail in self.tails:
            tail.close()
        self.threads.shutdown(wait=False)


class Tail:
    """The rows of one kind of one run while it has readers.

    Args:
        source: Reads them.
        streams: What all readers share.
        visible: Returns the number of rows that readers may see.

    Attributes:
        readers: Number of readers.
        is_closed: Whether the daemon shuts down or the run was deleted: readers must end, and have not seen
            the end of the rows.
    """

    def __init__(self, source: RowLines, streams: Streams, visible: Callable[[], int]) -> None:
        self._source = source
        self._streams = streams
        self._visible = visible
        self._loop = asyncio.get_running_loop()
        self._reading: dict[_Key, asyncio.Future[Piece]] = {}
        self._waking: asyncio.TimerHandle | None = None
        self.news = asyncio.Event()
        """Set when there may be more rows; then a new event takes its place."""
        self.readers = 0
        self.is_closed = False

    @property
    def rows(self) -> int:
        """Number of rows that readers may see now."""
        return self._visible()

    async def piece(self, at: Position, form: RowForm, limit: int | None = None) -> Piece | None:
        """The rows from a position on; None if there are none yet.

        Args:
            at: The position.
            form: The form to send them in.
            limit: Maximum number of rows.

        Raises:
            SinkError: They cannot be read.
        """
        if at.seq >= self.rows:
            return None
        key = (self, at.seq, form)
        piece = self._streams.cache.get(key)
        if piece is None:
            piece = await asyncio.shield(self._reading.get(key) or self._read(key, at.cursor))
        if limit is None or piece.rows <= limit:
            return piece
        return await self._in_thread(partial(self._load, at.seq, at.cursor, form, limit))

    def wake(self) -> None:
        """There may be more rows, or the run has ended. For the event loop's thread."""
        if self._waking is None and self.readers:
            wait_s = min(_LONGEST_LINGER_S, _LINGER_S * self.readers)
            self._waking = self._loop.call_later(wait_s, self._wake_now)

    def close(self) -> None:
        """End its readers."""
        self.is_closed = True
        self._wake_now()

    def _wake_now(self) -> None:
        if self._waking is not None:
            self._waking.cancel()
            self._waking = None
        self.news, had_none = asyncio.Event(), self.news
        had_none.set()

    def _read(self, key: _Key, cursor: Cursor) -> "asyncio.Future[Piece]":
        _, first, form = key
        reading = self._in_thread(partial(self._load, first, cursor, form, self.rows - first))
        self._reading[key] = reading
        reading.add_done_callback(partial(self._keep, key))
        return reading

    def _keep(self, key: _Key, reading: "asyncio.Future[Piece]") -> None:
        del self._reading[key]
        if reading.cancelled() or reading.exception() is not None:
            return  # raised where it is awaited
        if self.readers:
            self._streams.cache.put(key, reading.result())

    def _in_thread(self, load: Callable[[], Piece]) -> "asyncio.Future[Piece]":
        return self._loop.run_in_executor(self._streams.threads, load)

    def _load(self, first: int, cursor: Cursor, form: RowForm, limit: int) -> Piece:
        cursor = copy(cursor)  # `lines` moves it, and the one given belongs to a piece that others hold
        lines = self._source.lines(first, limit, PIECE_BYTES, cursor)
        if not lines:  # never taken for the end of the rows
            raise SinkError(f"row {first} cannot be read, though it was written")
        return Piece(form.rows(first, lines), len(lines), Position(first + len(lines), cursor))


class RunTails:
    """The rows of one run, of all kinds, for readers.

    Args:
        root: The run directory.
        streams: What the readers of all runs share.
    """

    def __init__(self, root: Path, streams: Streams) -> None:
        self._root = root
        self._streams = streams
        self._loop = asyncio.get_running_loop()
        self._tails: dict[str, Tail] = {}
        self._visible: dict[str, int] = {}
        """Numbers of rows that readers may see; without a kind before the run has told, or was counted."""

    def on_rows(self, kind: str, rows: int) -> None:
        """The run has this many rows of a kind that readers may see. May be called from any thread."""
        self._visible[kind] = rows
        if kind in self._tails:
            with suppress(RuntimeError):  # the event loop has been closed meanwhile
                self._loop.call_soon_threadsafe(self._wake, kind)

    def has_changed(self) -> None:
        """The state of the run has changed: readers look whether it has ended."""
        for tail in self._tails.values():
            tail.wake()

    def close(self) -> None:
        """The run is being deleted: end its readers."""
        for tail in self._tails.values():
            tail.close()

    async def rows(self, kind: str) -> int:
        """The number of rows of a kind that readers may see.

        Raises:
            SinkError: They cannot be counted.
        """
        if kind not in self._visible:
            count = await self._loop.run_in_executor(self._streams.threads, _count, self._root, kind)
            self._visible.setdefault(kind, count)
        return self._visible[kind]

    @asynccontextmanager
    async def reading(self, kind: str) -> AsyncIterator[Tail]:
        """The tail of a kind, for one reader."""
        await self.rows(kind)
        tail = self._tails.get(kind)
        if tail is None:
            source = RunRows(self._root, kind)
            tail = self._tails[kind] = Tail(source, self._streams, lambda: self._visible[kind])
            self._streams.tails.add(tail)
        tail.readers += 1
        try:
            yield tail
        finally:
            tail.readers -= 1
            if not tail.readers:
                del self._tails[kind]
                self._streams.tails.discard(tail)
                self._streams.cache.drop(tail)

    def _wake(self, kind: str) -> None:
        if (tail := self._tails.get(kind)) is not None:
            tail.wake()


def _count(root: Path, kind: str) -> int:
    """The number of rows of a kind on disk, all synced by then. Reads the shards that are not sealed.

    Raises:
        SinkError: A file cannot be read.
    """
    with disk_errors(f"read {root / kind}"):
        for path in (root / kind).glob(f"part-*{OPEN_SUFFIX}"):
            with path.open("rb") as file:
                os.fsync(file.fileno())  # a run that was killed may not have
    sealed = Manifest(root / "manifest.jsonl").of_kind(kind)
    source, cursor = RunRows(root, kind), Cursor()
    rows = sealed[-1].last_seq + 1 if sealed else 0
    while lines := source.lines(rows, _NO_LIMIT, CHUNK_BYTES, cursor):
        rows += len(lines)
    return rows
