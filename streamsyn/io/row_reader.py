"""The rows of files and datasets, in every format that streamsyn reads, each with its place.

`open_rows` picks the reader. JSON lines come undecoded (`Line`): a caller can count or skip them cheaply, and
decides what a bad one means. `decode_all` is for callers that refuse a file with a bad row.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from streamsyn.io.delimited import DelimitedReader
from streamsyn.io.json_rows import JsonReader, decode_json
from streamsyn.io.paths import Kind, kind_of
from streamsyn.io.places import HubDataset, Place, RemoteSaved
from streamsyn.io.rows import ReadOptions, RowReader, TableRow, is_blank
from streamsyn.io.tables import HubReader, ParquetReader, SavedDatasetReader


def open_rows(place: Place, options: ReadOptions) -> RowReader:
    """The reader of a file, by its name, or of a dataset. Plain text has no rows: see `io.content`.

    Raises:
        ConfigError: The file is missing.
    """
    if isinstance(place, HubDataset):
        return HubReader(place, options)
    if isinstance(place, RemoteSaved) or (isinstance(place, Path) and place.is_dir()):
        return SavedDatasetReader(place, options)
    match kind_of(place):
        case Kind.PARQUET:
            return ParquetReader(place, options)
        case Kind.CSV:
            return DelimitedReader(place, options, None)
        case Kind.TSV:
            return DelimitedReader(place, options, "\t")
        case _:
            return JsonReader(place, options)


def decode_all(place: Place, options: ReadOptions) -> Iterator[tuple[str, Any]]:
    """Every row of a file or dataset decoded, with its place as `file:number`.

    Raises:
        ConfigError: A row is longer than the limit or cannot be decoded, or the file cannot be read.
    """
    for batch in open_rows(place, options).batches():
        for row in batch.rows:
            if is_blank(row):
                continue
            where = f"{batch.source}:{row.number}"
            if isinstance(row, TableRow):
                for error in (row.error, *row.unreadable.values()):
                    if isinstance(error, UnicodeDecodeError) or row.error is not None:
                        raise options.error(where, f"cannot be read: {error}")
                yield where, row.value
                continue
            if row.text is None:
                raise options.error(where, f"is longer than {options.max_line_bytes} bytes")
            try:
                yield where, decode_json(row.text)
            except orjson.JSONDecodeError as error:
                raise options.error(where, f"is not valid JSON: {error}") from error
