"""The texts of evaluation sets: every string in any row of JSON lines, Parquet or text files."""

import codecs
import glob
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from streamsyn.errors import ConfigError
from streamsyn.seeds.files import BATCH_ROWS, COMPRESSED_SUFFIXES, LINE_SUFFIXES, plain_chunks
from streamsyn.seeds.lines import Line, split_lines

MAX_LINE_BYTES = 512 * 2**20
PIECE_CHARS = 2**20
OVERLAP_CHARS = 2**14
"""Pieces of a long text share so much that each run of words is whole in one of them."""


def find(pattern: str) -> list[Path]:
    """The files that a path, a directory (all below it) or a glob names, sorted.

    Raises:
        ConfigError: There are none.
    """
    path = Path(pattern)
    try:
        if pattern and path.exists():
            found = [path]
        else:
            found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
        files = list(dict.fromkeys(chain.from_iterable(map(_files_below, found))))
    except OSError as error:
        raise ConfigError(f"checks.eval_sets: {pattern} cannot be read: {error}") from error
    if files:
        return files
    if not found:
        raise ConfigError(f"checks.eval_sets: {pattern!r} does not exist")
    raise ConfigError(
        f"checks.eval_sets: {pattern} has no file of a known kind; there are .jsonl, .ndjson, .json, .txt "
        "(each also .gz or .zst) and .parquet"
    )


def texts(path: Path) -> Iterator[str]:
    """All strings in a file, long ones in pieces that overlap.

    Raises:
        ConfigError: It cannot be read to its end.
    """
    try:
        if path.suffix == ".parquet":
            rows: Iterable[Any] = _parquet_rows(path)
        elif _kind(path) == ".txt":
            yield from pieces(_decoded(path))
            return
        else:
            rows = _json_rows(path)
        for text in _strings(rows):
            yield from pieces([text])
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"checks.eval_sets: {path} cannot be read to its end: {error}") from error


def pieces(parts: Iterable[str]) -> Iterator[str]:
    """A text in pieces of a bounded size, each with the end of the one before it, cut between words."""
    held = ""
    fresh = False
    for part in parts:
        for start in range(0, len(part), PIECE_CHARS):
            held += part[start : start + PIECE_CHARS]
            fresh = True
            if len(held) > PIECE_CHARS:
                end = _cut(held, len(held) - OVERLAP_CHARS, len(held))
                yield held[:end]
                held = held[_cut(held, max(0, end - 2 * OVERLAP_CHARS), end - OVERLAP_CHARS) :]
                fresh = False
    if fresh:
        yield held


def _cut(text: str, start: int, end: int) -> int:
    """The last place between words in a stretch of a text; its end where there is none."""
    return next((at for at in range(end - 1, start, -1) if text[at].isspace()), end)


def _files_below(path: Path) -> Iterator[Path]:
    if path.is_dir():
        for child in sorted(path.iterdir()):
            yield from _files_below(child)
    elif path.is_file() and (path.suffix == ".parquet" or _kind(path)):
        yield path


def _kind(path: Path) -> str | None:
    """The suffix before that of the compression, if it is a known one."""
    for suffix in (*LINE_SUFFIXES, ".txt"):
        if any(path.name.endswith(suffix + compressed) for compressed in COMPRESSED_SUFFIXES):
            return suffix
    return None


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as raw:
        for chunk in plain_chunks(path.suffix, raw):
            yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _json_rows(path: Path) -> Iterator[Any]:
    with path.open("rb") as raw:
        for lines in split_lines(plain_chunks(path.suffix, raw), MAX_LINE_BYTES):
            for line in lines:
                if line.text is None:
                    raise ConfigError(
                        f"checks.eval_sets: {path}:{line.number} is longer than {MAX_LINE_BYTES} bytes"
                    )
                if not line.text.strip():
                    continue
                try:
                    row = orjson.loads(line.text)
                except orjson.JSONDecodeError as error:
                    yield _document(path, line, error)
                    return
                yield row


def _document(path: Path, line: Line, error: orjson.JSONDecodeError) -> Any:
    """A .json file of one document over many lines."""
    if line.number == 1 and _kind(path) == ".json":
        try:
            return orjson.loads("".join(_decoded(path)))
        except orjson.JSONDecodeError as failure:
            error = failure
    raise ConfigError(f"checks.eval_sets: {path}:{line.number} is no JSON: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise ConfigError(f"checks.eval_sets: {path} cannot be read as Parquet: {error}") from error


def _strings(rows: Iterable[Any]) -> Iterator[str]:
    """Every string in lists and objects of any depth, in their order; names of fields are none."""
    for row in rows:
        waiting = [row]
        while waiting:
            value = waiting.pop()
            if isinstance(value, str):
                yield value
            elif isinstance(value, dict):
                waiting.extend(reversed(value.values()))
            elif isinstance(value, list | tuple):
                waiting.extend(reversed(value))
