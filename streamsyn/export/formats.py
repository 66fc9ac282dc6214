"""Files of rows: JSON lines, Parquet, and the Arrow streams of a saved data set.

Each holds back a bounded amount of rows, and makes the same bytes of the same rows.

Rows into files: one row of shards for each split, within a bounded amount of memory.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from streamsyn.export.export_request import ExportRequest
from streamsyn.export.rows import SCHEMA, Row, text_bytes
from streamsyn.export.splits import Split, Splits, TaskNames
from streamsyn.export.target import Target, TargetFile

GROUP_BYTES = 32 * 2**20
"""Rows of a row group, or of a record batch, before compression."""
SUFFIXES = {
    ("jsonl", "none"): ".jsonl",
    ("jsonl", "zstd"): ".jsonl.zst",
    ("datasets", "none"): ".arrow",
}


def suffix(form: str, codec: str) -> str:
    """How names of files in this format end."""
    return SUFFIXES.get((form, codec), f".{form}")


class RowFile(Protocol):
    """A file that rows are written to."""

    @property
    def held_bytes(self) -> int:
        """Rows that are held back, before compression."""
        ...

    def write(self, row: Row, size: int) -> None:
        """Take in a row of so many bytes."""
        ...

    def flush(self) -> None:
        """Write what is held back."""
        ...

    def close(self) -> None:
        """Write what is held back, and the file's end."""
        ...


def open_rows(file: TargetFile, form: str, codec: str) -> RowFile:
    """A file of rows in a format of `request.COMPRESSIONS`."""
    if form == "jsonl":
        return _Lines(file, codec)
    return _Groups(_ArrowStream(file) if form == "datasets" else _Parquet(file, codec))


class _Lines:
    """JSON lines; nothing is held back."""

    held_bytes = 0

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
        """There is nothing to write."""

    def close(self) -> None:
        if self._compressor is not None:
            self._file.write(self._compressor.flush())


class _Groups:
    """Rows gathered until they make a group."""

    def __init__(self, writer: "_ArrowStream | _Parquet") -> None:
        self._writer = writer
        self._rows: list[Row] = []
        self.held_bytes = 0

    def write(self, row: Row, size: int) -> None:
        self._rows.append(row)
        self.held_bytes += size
        if self.held_bytes >= GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._writer.write(pyarrow.RecordBatch.from_pylist(self._rows, schema=SCHEMA))
            self._rows.clear()
            self.held_bytes = 0

    def close(self) -> None:
        self.flush()
        self._writer.close()


class _Parquet:
    """A row group for each group."""

    def __init__(self, file: TargetFile, codec: str) -> None:
        texts = ["messages.list.element.content", "messages.list.element.role"]
        figures = [name for name in SCHEMA.names if name not in ("messages", "context_seqs", "flags")]
        self._writer = pyarrow.parquet.ParquetWriter(
            file,
            SCHEMA,
            compression=codec,
            use_dictionary=["task", "model", texts[1]],  # what is long is never twice the same
            write_statistics=figures,
            write_batch_size=16,  # rows between two looks at a page's size: pages stay near 1 MiB
        )

    def write(self, batch: Any) -> None:
        self._writer.write_table(pyarrow.Table.from_batches([batch]), row_group_size=batch.num_rows)

    def close(self) -> None:
        self._writer.close()


class _ArrowStream:
    """A record batch for each group."""

    def __init__(self, file: TargetFile) -> None:
        self._writer = pyarrow.ipc.new_stream(file, SCHEMA)

    def write(self, batch: Any) -> None:
        self._writer.write_batch(batch)

    def close(self) -> None:
        self._writer.close()


HELD_BYTES = 256 * 2**20
"""What all files together may hold back."""


@dataclass(slots=True)
class Shards:
    """The files of one split."""

    stem: str
    names: list[str] = field(default_factory=list)
    rows: int = 0
    shard_rows: int = 0
    shard_bytes: int = 0
    file: TargetFile | None = None
    writer: RowFile | None = None


class ShardWriter:
    """Writes rows to the shards of their splits.

    Args:
        target: The folder.
        request: Says in which format, and how large a shard may be.
        stem: The beginning of the names of a split's files.
    """

    def __init__(self, target: Target, request: ExportRequest, stem: Callable[[Split], str]) -> None:
        self._target = target
        self._request = request
        self._stem = stem
        self._suffix = suffix(request.format, request.codec)
        self.splits: dict[Split, Shards] = {}

    def write(self, split: Split, row: Row) -> int:
        """Add a row; its bytes before compression."""
        if split not in self.splits:
            self.splits[split] = Shards(self._stem(split))
        shards, size = self.splits[split], text_bytes(row)
        writer = shards.writer or self._begin(shards)
        writer.write(row, size)
        shards.rows += 1
        shards.shard_rows += 1
        shards.shard_bytes += size
        if shards.shard_bytes >= self._request.shard_bytes or shards.shard_rows == self._request.shard_rows:
            self._end(shards)
        self._keep_in_bounds()
        return size

    def close(self) -> None:
        """Write what is held back."""
        for shards in self.splits.values():
            self._end(shards)

    def abandon(self) -> None:
        """Let files be as they are: another error is on its way."""
        for shards in self.splits.values():
            if shards.file is not None:
                shards.file.abandon()

    def _begin(self, shards: Shards) -> RowFile:
        name = f"{shards.stem}-{len(shards.names):05d}{self._suffix}"
        shards.names.append(name)
        shards.file = self._target.open(name)
        shards.writer = open_rows(shards.file, self._request.format, self._request.codec)
        return shards.writer

    def _end(self, shards: Shards) -> None:
        if shards.file is None or shards.writer is None:
            return
        shards.writer.close()
        shards.file.close()
        self._target.note(shards.names[-1], shards.file, shards.shard_rows)
        shards.file = shards.writer = None
        shards.shard_rows = shards.shard_bytes = 0

    def _keep_in_bounds(self) -> None:
        """Have the one that holds back most write it, when there is too much."""
        writers = [shards.writer for shards in self.splits.values() if shards.writer is not None]
        if sum(writer.held_bytes for writer in writers) > HELD_BYTES:
            max(writers, key=lambda writer: writer.held_bytes).flush()


class Layout:
    """How files and splits are called.

    Args:
        form: The format.
        splits: Says whether each task is a configuration of its own.
    """

    def __init__(self, form: str, splits: Splits) -> None:
        self._is_saved = form == "datasets"
        self._by_task = splits.by_task
        self._is_single = not splits.by_task and len(splits.shares) == 1
        self._shares = len(splits.shares)
        self._names = TaskNames()

    def stem(self, split: Split) -> str:
        """The beginning of the names of a split's files."""
        if self._is_saved:
            return f"{self.saved_name(split)}/data" if not self._is_single else "data"
        folder = f"data/{self._names(split.task)}" if split.task is not None else "data"
        return f"{folder}/{split.name}"

    def saved_name(self, split: Split) -> str:
        """The key of a split in a saved data set: that of its task, where tasks are all that is split by."""
        if split.task is None:
            return split.name
        return self._names(split.task) + (f".{split.name}" if self._shares > 1 else "")

    def saved_splits(self, written: dict[Split, Shards]) -> dict[str, Shards] | None:
        """The splits of a saved data set; None where it is a single one, without a name."""
        if self._is_single:
            return None
        return {self.saved_name(split): shards for split, shards in written.items()}

    def configs(self, written: dict[Split, Shards]) -> list[tuple[str, list[tuple[str, str]]]]:
        """(name, [(split, pattern)]) of each configuration that has rows."""
        if self._is_saved or not written:
            return []
        pattern = "data/*/{}-*" if self._by_task else "data/{}-*"
        names = dict.fromkeys(split.name for split in written)
        configs = [("default", [(name, pattern.format(name)) for name in names])]
        tasks: dict[str, list[tuple[str, str]]] = {}
        for split, shards in written.items():
            if split.task is not None:
                tasks.setdefault(self._names(split.task), []).append((split.name, f"{shards.stem}-*"))
        return configs + sorted(tasks.items())


def save_states(target: Target, layout: Layout, written: dict[Split, Shards]) -> None:
    """What `datasets.load_from_disk` looks for, beside the files of rows."""
    if not written:
        return
    digests = {file["path"]: file["sha256"] for file in target.files}
    named = layout.saved_splits(written)
    for name, shards in (named or {"train": next(iter(written.values()))}).items():
        folder = f"{name}/" if named is not None else ""
        together = "".join(digests[path] for path in shards.names)
        state: dict[str, Any] = {
            "_data_files": [{"filename": path.rpartition("/")[2]} for path in shards.names],
            # What `datasets` makes of these rows is cached by it: it must tell rows from rows.
            "_fingerprint": hashlib.sha256(together.encode()).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": name,
        }
        target.put(f"{folder}state.json", orjson.dumps(state, option=orjson.OPT_INDENT_2))
        target.put(f"{folder}dataset_info.json", b"{}")
    if named is not None:
        target.put("dataset_dict.json", orjson.dumps({"splits": list(named)}))
