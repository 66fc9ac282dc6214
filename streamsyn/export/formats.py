"""Files of rows: JSON lines, Parquet, and the Arrow streams of a saved data set.

Each holds back a bounded amount of rows, and makes the same bytes of the same rows.
"""

from typing import Any, Protocol

import orjson
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from streamsyn.export.rows import SCHEMA, Row
from streamsyn.export.target import TargetFile

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
