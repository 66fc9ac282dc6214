"""Shard files: rows in JSON Lines, Parquet, or the Arrow streams of a saved `datasets` directory.

`ShardWriter` writes each split to its own shards. Open files buffer a bounded amount of rows, and the same
rows give the same bytes.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import orjson
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from streamsyn.export.export_request import ExportRequest
from streamsyn.export.log_reader import SCHEMA, Row, row_bytes
from streamsyn.export.splits import Layout, Split
from streamsyn.export.target import Target, TargetFile

GROUP_BYTES = 32 * 2**20
"""Size of a row group or a record batch, before compression."""
_SUFFIXES = {
    ("jsonl", "none"): ".jsonl",
    ("jsonl", "zstd"): ".jsonl.zst",
    ("datasets", "none"): ".arrow",
}
BUFFER_BYTES = 256 * 2**20
"""Size of the rows that all open files together may buffer."""


@dataclass(slots=True)
class Shards:
    """The files of one split. `shard_rows` and `shard_bytes` are those of the open file."""

    stem: str
    names: list[str] = field(default_factory=list)
    rows: int = 0
    shard_rows: int = 0
    shard_bytes: int = 0
    file: TargetFile | None = None
    writer: "RowFile | None" = None


class ShardWriter:
    """Writes rows to the shards of their splits.

    Args:
        target: The folder.
        request: The format, and the size of a shard.
        stem: Returns the beginning of the names of a split's files.
    """

    def __init__(self, target: Target, request: ExportRequest, stem: Callable[[Split], str]) -> None:
        self._target = target
        self._request = request
        self._stem = stem
        self._suffix = _SUFFIXES.get((request.format, request.codec), f".{request.format}")
        self._thread = WriterThread() if request.workers > 1 else None
        self.splits: dict[Split, Shards] = {}

    def write(self, split: Split, row: Row) -> int:
        """Write a row; return its approximate size in bytes before compression."""
        if split not in self.splits:
            self.splits[split] = Shards(self._stem(split))
        shards, size = self.splits[split], row_bytes(row)
        writer = shards.writer or self._begin(shards)
        writer.write(row, size)
        shards.rows += 1
        shards.shard_rows += 1
        shards.shard_bytes += size
        if shards.shard_bytes >= self._request.shard_bytes or shards.shard_rows == self._request.shard_rows:
            self._end(shards)
        self._limit_buffers()
        return size

    def close(self) -> None:
        """Finish all files."""
        for shards in self.splits.values():
            self._end(shards)
        if self._thread is not None:
            self._thread.close()

    def abandon(self) -> None:
        """Close all files as they are, while another error is raised."""
        if self._thread is not None:
            self._thread.close()
        for shards in self.splits.values():
            if shards.file is not None:
                shards.file.abandon()

    def _begin(self, shards: Shards) -> "RowFile":
        name = f"{shards.stem}-{len(shards.names):05d}{self._suffix}"
        shards.names.append(name)
        shards.file = self._target.open(name)
        shards.writer = open_rows(shards.file, self._request.format, self._request.codec, self._thread)
        return shards.writer

    def _end(self, shards: Shards) -> None:
        if shards.file is None or shards.writer is None:
            return
        shards.writer.close()
        shards.file.close()
        self._target.record(shards.names[-1], shards.file, shards.shard_rows)
        shards.file = shards.writer = None
        shards.shard_rows = shards.shard_bytes = 0

    def _limit_buffers(self) -> None:
        """If too much is buffered, flush the file that buffers the most."""
        writers = [shards.writer for shards in self.splits.values() if shards.writer is not None]
        if sum(writer.buffered_bytes for writer in writers) > BUFFER_BYTES:
            max(writers, key=lambda writer: writer.buffered_bytes).flush()


def save_states(target: Target, layout: Layout, written: dict[Split, Shards]) -> None:
    """Write the files that `datasets.load_from_disk` needs besides the shards."""
    if not written:
        return
    digests = {file["path"]: file["sha256"] for file in target.files}
    for split, shards in written.items():
        name = "train" if layout.is_single else layout.saved_name(split)
        folder = "" if layout.is_single else f"{name}/"
        combined = "".join(digests[path] for path in shards.names)
        state: dict[str, Any] = {
            "_data_files": [{"filename": path.rpartition("/")[2]} for path in shards.names],
            # The key of caches that `datasets` derives from these rows, so it has to depend on them.
            "_fingerprint": hashlib.sha256(combined.encode()).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": name,
        }
        target.put(f"{folder}state.json", orjson.dumps(state, option=orjson.OPT_INDENT_2))
        target.put(f"{folder}dataset_info.json", b"{}")
    if not layout.is_single:
        target.put("dataset_dict.json", orjson.dumps({"splits": [*map(layout.saved_name, written)]}))


class WriterThread:
    """Writes one group of rows at a time, which compresses it, while the next group is made."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="export-write")
        self._last: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Write after the last group. Raises what writing that raised."""
        self.wait()
        self._last = self._thread.submit(write)

    def wait(self) -> None:
        """Wait until the last group is written. Raises what that raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """End the thread after its last group."""
        self._thread.shutdown()


class RowFile(Protocol):
    """A file that rows are written to."""

    @property
    def buffered_bytes(self) -> int:
        """Size of the buffered rows before compression."""
        ...

    def write(self, row: Row, size: int) -> None:
        """Add a row of `size` bytes."""
        ...

    def flush(self) -> None:
        """Write the buffered rows."""
        ...

    def close(self) -> None:
        """Write the buffered rows and the end of the file."""
        ...


def open_rows(file: TargetFile, form: str, codec: str, thread: WriterThread | None = None) -> RowFile:
    """Start a file of rows in a format and compression of `COMPRESSIONS`."""
    if form == "jsonl":
        return _Lines(file, codec)
    return _Groups(_ArrowStream(file) if form == "datasets" else _Parquet(file, codec), thread)


class _Lines:
    """JSON Lines; nothing is buffered."""

    buffered_bytes = 0

    def __init__(self, file: TargetFile, codec: str) -> None:
        self._file = file
        self._compressor: Any = None
        if codec == "zstd":
            import zstandard

            self._compressor = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()

    def write(self, row: Row, _size: int) -> None:
        line = orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
        self._file.write(line if self._compressor is None else self._compressor.compress(line))

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        if self._compressor is not None:
            self._file.write(self._compressor.flush())


class _Groups:
    """Collects rows into groups of GROUP_BYTES."""

    def __init__(self, writer: "_ArrowStream | _Parquet", thread: WriterThread | None) -> None:
        self._writer = writer
        self._thread = thread
        self._rows: list[Row] = []
        self.buffered_bytes = 0

    def write(self, row: Row, size: int) -> None:
        self._rows.append(row)
        self.buffered_bytes += size
        if self.buffered_bytes >= GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            batch = pyarrow.RecordBatch.from_pylist(self._rows, schema=SCHEMA)
            if self._thread is None:
                self._writer.write(batch)
            else:
                self._thread.start(partial(self._writer.write, batch))
            self._rows.clear()
            self.buffered_bytes = 0

    def close(self) -> None:
        self.flush()
        if self._thread is not None:
            self._thread.wait()
        self._writer.close()


class _Parquet:
    """Writes each group as a row group."""

    def __init__(self, file: TargetFile, codec: str) -> None:
        texts = ["messages.list.element.content", "messages.list.element.role"]
        short = [name for name in SCHEMA.names if name not in ("messages", "context_seqs", "flags")]
        self._writer = pyarrow.parquet.ParquetWriter(
            file,
            SCHEMA,
            compression=codec,
            use_dictionary=["task", "model", texts[1]],  # long texts do not repeat
            write_statistics=short,
            write_batch_size=16,  # the page size is checked this often, so that pages stay near 1 MiB
        )

    def write(self, batch: Any) -> None:
        self._writer.write_table(pyarrow.Table.from_batches([batch]), row_group_size=batch.num_rows)

    def close(self) -> None:
        self._writer.close()


class _ArrowStream:
    """Writes each group as a record batch."""

    def __init__(self, file: TargetFile) -> None:
        self._writer = pyarrow.ipc.new_stream(file, SCHEMA)

    def write(self, batch: Any) -> None:
        self._writer.write_batch(batch)

    def close(self) -> None:
        self._writer.close()
