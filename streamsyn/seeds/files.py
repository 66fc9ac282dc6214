"""Seeds in files: JSON lines (plain, .gz, .zst), Parquet, a saved `datasets` directory."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from streamsyn.config.sections import SeedsSection
from streamsyn.errors import ConfigError
from streamsyn.io.lines import split_lines
from streamsyn.records import Entry
from streamsyn.seeds.parse import SeedParser

CHUNK_BYTES = 256 * 1024
ZSTD_CHUNK_BYTES = 64
"""Four bytes can stand for a block of 128 KiB: so few are decompressed at once that memory is bounded."""
BATCH_ROWS = 256
BATCH_DOCUMENTS = 16
"""A document may be as long as a book: so few rows of them are held at once."""
LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSED_SUFFIXES = ("", ".gz", ".zst")


class SeedSource(Protocol):
    """Yields batches of entries, in a fixed order. Read in a thread: it may block."""

    def batches(self) -> Iterator[list[Entry]]:
        """The entries, in batches of a bounded size.

        Raises:
            ConfigError: The source cannot be read (any further); the message names it.
        """
        ...

    def fraction(self) -> float | None:
        """Share of the source that has been read, where its size is known."""
        ...


class JsonLinesSource:
    """A file of JSON lines."""

    def __init__(
        self, path: Path, task: str | None, seeds: SeedsSection, *, takes_documents: bool = False
    ) -> None:
        self._path = path
        self._task = task or _stem(path)
        self._max_line_bytes = seeds.max_line_bytes
        self._parser = SeedParser(seeds.fields, takes_documents=takes_documents)
        self._size = path.stat().st_size
        self._position = 0

    def batches(self) -> Iterator[list[Entry]]:
        source = str(self._path)
        try:
            with self._path.open("rb") as raw:
                for lines in split_lines(self._chunks(raw), self._max_line_bytes):
                    parsed = [
                        self._parser.line(line, source, self._task, self._max_line_bytes) for line in lines
                    ]
                    yield [entry for entry in parsed if entry is not None]
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"{source} cannot be read to its end: {error}") from error

    def fraction(self) -> float | None:
        return self._position / self._size if self._size else 1.0

    def _chunks(self, raw: IO[bytes]) -> Iterator[bytes]:
        for chunk in plain_chunks(self._path.suffix, raw):
            self._position = raw.tell()
            yield chunk


def plain_chunks(suffix: str, raw: IO[bytes]) -> Iterator[bytes]:
    """The bytes of a file, decompressed as its suffix says."""
    if suffix == ".zst":
        yield from _zstd_chunks(raw)
    elif suffix == ".gz":
        with gzip.GzipFile(fileobj=raw) as stream:
            # `read1` hands over what comes before a broken place; `read` would drop it with its error.
            while chunk := stream.read1(CHUNK_BYTES):
                yield chunk
    else:
        while chunk := raw.read(CHUNK_BYTES):
            yield chunk


def _zstd_chunks(raw: IO[bytes]) -> Iterator[bytes]:
    import zstandard

    # The package's stream reader takes a file that is cut short for a whole one.
    frame = None
    try:
        while pending := raw.read(ZSTD_CHUNK_BYTES):
            while pending:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                if chunk := frame.decompress(pending):
                    yield chunk
                pending = frame.unused_data
                frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("the last zstd frame has no end")
    except zstandard.ZstdError as error:
        raise OSError(f"not (or no longer) valid zstd: {error}") from error


class ParquetSource:
    """A Parquet file; a row's number counts from 1, as lines do."""

    def __init__(
        self, path: Path, task: str | None, seeds: SeedsSection, *, takes_documents: bool = False
    ) -> None:
        self._path = path
        self._task = task or _stem(path)
        self._parser = SeedParser(seeds.fields, takes_documents=takes_documents)
        self._batch_rows = BATCH_DOCUMENTS if takes_documents else BATCH_ROWS
        self._read = 0
        self._rows: int | None = None

    def batches(self) -> Iterator[list[Entry]]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self._path) as file:
                self._rows = file.metadata.num_rows
                for batch in file.iter_batches(batch_size=self._batch_rows):
                    yield self._entries(batch)
        except (OSError, pyarrow.ArrowException) as error:
            raise ConfigError(f"{self._path} cannot be read to its end as Parquet: {error}") from error

    def fraction(self) -> float | None:
        return None if self._rows is None else self._read / max(1, self._rows)

    def _entries(self, batch: Any) -> list[Entry]:
        first = self._read + 1
        self._read += batch.num_rows
        return list(_row_entries(batch, first, str(self._path), self._task, self._parser))


class SavedDatasetSource:
    """A directory written by `datasets.save_to_disk`; a DatasetDict is read split by split."""

    def __init__(
        self, path: Path, task: str | None, seeds: SeedsSection, *, takes_documents: bool = False
    ) -> None:
        self._path = path
        self._task = task or path.name
        self._parser = SeedParser(seeds.fields, takes_documents=takes_documents)
        self._batch_rows = BATCH_DOCUMENTS if takes_documents else BATCH_ROWS
        self._read = 0
        self._rows: int | None = None

    def batches(self) -> Iterator[list[Entry]]:
        import datasets

        try:
            saved = datasets.load_from_disk(str(self._path))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{self._path} cannot be read as a saved dataset: {error}") from error
        splits = {"": saved} if isinstance(saved, datasets.Dataset) else dict(saved)
        self._rows = sum(len(split) for split in splits.values())
        for name, split in splits.items():
            source = f"{self._path}[{name}]" if name else str(self._path)
            tables = split.with_format("arrow")
            for start in range(0, len(split), self._batch_rows):
                rows = tables[start : start + self._batch_rows]
                self._read += rows.num_rows
                yield list(_row_entries(rows, start + 1, source, self._task, self._parser))

    def fraction(self) -> float | None:
        return None if self._rows is None else self._read / max(1, self._rows)


def _row_entries(rows: Any, first: int, source: str, task: str, parser: SeedParser) -> Iterator[Entry]:
    """The entries of an Arrow table; a value that Python cannot hold spoils its own row alone."""
    try:
        decoded = rows.to_pylist()
    except (ValueError, OverflowError) as error:
        if rows.num_rows == 1:
            yield parser.unreadable(error, f"{source}:{first}")
            return
        for index in range(rows.num_rows):
            yield from _row_entries(rows.slice(index, 1), first + index, source, task, parser)
        return
    for number, row in enumerate(decoded, first):
        yield parser.row(row, f"{source}:{number}", task, b"row")


def is_saved_dataset(path: Path) -> bool:
    """Whether a directory holds what `datasets.save_to_disk` writes."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def is_run_directory(path: Path) -> bool:
    """Whether a directory is one that `run` writes to."""
    return (path / "run.json").is_file() and (
        (path / "manifest.jsonl").is_file() or (path / "contexts").is_dir()
    )


def is_seed_file(path: Path) -> bool:
    """Whether the name is one of a kind that can be read."""
    return path.suffix == ".parquet" or any(
        path.name.endswith(suffix + compressed)
        for suffix in LINE_SUFFIXES
        for compressed in COMPRESSED_SUFFIXES
    )


def _stem(path: Path) -> str:
    return path.name.split(".")[0] or path.name
