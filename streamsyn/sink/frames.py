"""How rows lie in a shard, so that a torn end is found.

Plain: a row is a line of JSON; one that does not end, or does not parse, is torn. zstd: each append
is a frame of its own with a checksum; a frame that does not end or check is torn.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

CHUNK_BYTES = 1 << 20
SUFFIXES = {"none": ".jsonl", "zstd": ".jsonl.zst"}


def line(row: dict[str, Any]) -> bytes:
    """A row as the log has it."""
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def encode(lines: bytes, compression: str) -> bytes:
    """The bytes to append for some whole lines."""
    if compression == "none":
        return lines
    import zstandard

    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(lines)


def scan(path: Path, start: int = 0) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Rows of a shard, open or sealed, with the offset behind them; ends before the first torn part.

    Args:
        path: The shard.
        start: The offset at which a row, or a frame, begins.
    """
    parts = _zstd_frames(path, start) if ".zst" in path.suffixes else _lines(path, start)
    for end, data in parts:
        rows = _decode(data)
        if rows is None:
            return
        yield end, rows


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a shard without their offsets."""
    for _, some in scan(path):
        yield from some


def _decode(data: bytes) -> list[dict[str, Any]] | None:
    try:
        decoded = [orjson.loads(line) for line in data.splitlines()]
    except orjson.JSONDecodeError:
        return None
    return decoded if all(isinstance(row, dict) for row in decoded) else None


def _lines(path: Path, end: int) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        file.seek(end)
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield end, line


def _zstd_frames(path: Path, end: int) -> Iterator[tuple[int, bytes]]:
    import zstandard

    with path.open("rb") as file:
        file.seek(end)
        pending = file.read(CHUNK_BYTES)
        while pending:
            frame = zstandard.ZstdDecompressor().decompressobj()
            parts = []
            while pending and not frame.eof:
                try:
                    parts.append(frame.decompress(pending))
                except zstandard.ZstdError:
                    return
                end += len(pending)
                pending = frame.unused_data if frame.eof else file.read(CHUNK_BYTES)
            if not frame.eof:
                return
            end -= len(pending)
            yield end, b"".join(parts)
            pending = pending or file.read(CHUNK_BYTES)
