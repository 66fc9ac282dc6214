"""Files of a corpus: text, JSON lines (plain, .gz, .zst), Parquet."""

import codecs
import glob
import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import orjson
import pyarrow
import pyarrow.parquet
import zstandard

from streamsyn.errors import ConfigError

_CHUNK_BYTES = 2**20
_ZSTD_CHUNK_BYTES = 64 * 1024
_BATCH_ROWS = 256
_LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
_COMPRESSED = ("", ".gz", ".zst")
_KEY = "assembly.corpus"


def read_documents(patterns: Sequence[str], field: str) -> Iterator[Iterable[str]]:
    """The documents in files, directories and globs, each as pieces of text; the same order every time.

    Raises:
        ConfigError: A file is not there, cannot be read, or has rows without text; the message names it.
    """
    for pattern in patterns:
        for path in _files(pattern):
            yield from _documents(path, field)


def _files(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) is not None)
    elif path.exists():
        found = [path]
    else:
        named = glob.glob(pattern, recursive=True)  # noqa: PTH207 - a Path takes no absolute pattern
        found = sorted(file for name in named if (file := Path(name)).is_file())
    if not found:
        raise ConfigError(f"{_KEY}: there are no files to read at {pattern}")
    for file in found:
        if _kind(file) is None:
            raise ConfigError(f"{_KEY}: {file} is neither .txt, .jsonl (also with .gz or .zst) nor .parquet")
    return found


def _kind(path: Path) -> str | None:
    if path.suffix == ".parquet":
        return "parquet"
    for compressed in _COMPRESSED:
        if path.name.endswith(f".txt{compressed}"):
            return "text"
        if any(path.name.endswith(suffix + compressed) for suffix in _LINE_SUFFIXES):
            return "lines"
    return None


def _documents(path: Path, field: str) -> Iterator[Iterable[str]]:
    try:
        match _kind(path):
            case "parquet":
                yield from ([text] for text in _parquet(path, field))
            case "lines":
                yield from ([text] for text in _lines(path, field))
            case _:
                yield _text(path)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{_KEY}: {path} cannot be read: {error}") from error


def _text(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        for chunk in _chunks(path):
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{_KEY}: {path} is not valid UTF-8: {error}") from error
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise ConfigError(f"{_KEY}: {path} cannot be read: {error}") from error


def _lines(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_split_lines(_chunks(path)), 1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise ConfigError(f"{_KEY}: {path}:{number} is no valid JSON: {error}") from error
        yield _field(row, field, f"{path}:{number}")


def _parquet(path: Path, field: str) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(path) as file:
        if field not in file.schema_arrow.names:
            raise ConfigError(f"{_KEY}: {path} has no column {field!r}; assembly.corpus_field names it")
        number = 0
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[field]):
            for row in batch.to_pylist():
                number += 1
                yield _field(row, field, f"{path}:{number}")


def _field(row: Any, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ConfigError(f"{_KEY}: {where} has no text in {field!r}; assembly.corpus_field names the field")
    return text


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as stream:
                while chunk := stream.read1(_CHUNK_BYTES):
                    yield chunk
        elif path.suffix == ".zst":
            yield from _zstd_chunks(raw)
        else:
            while chunk := raw.read(_CHUNK_BYTES):
                yield chunk


def _zstd_chunks(raw: IO[bytes]) -> Iterator[bytes]:
    # The package's stream reader takes a file that is cut short for a whole one.
    frame = None
    while pending := raw.read(_ZSTD_CHUNK_BYTES):
        while pending:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(pending)
            pending = frame.unused_data
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last zstd frame has no end")


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for chunk in chunks:
        first, *more = chunk.split(b"\n")
        rest.append(first)
        for line in more:
            yield b"".join(rest)
            rest = [line]
    yield b"".join(rest)
