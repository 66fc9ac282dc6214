"""Seeds in files of every format, with their places. For damaged files see tests/io/test_row_formats.py."""

import gzip
import os
import random
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard

from streamsyn.config.sections import SeedsSection
from streamsyn.errors import ConfigError
from streamsyn.records import BadSeed, Entry, RejectReason, Seed
from streamsyn.seeds.files import FileSource

MIB = 2**20
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.compress,
}


def row(number: int) -> dict[str, Any]:
    noise = random.Random(number).randbytes(30).hex()  # so that it does not compress to nothing
    return {"instruction": f"What is {number}?", "answer": f"It is {noise}.", "n": number}


def jsonl(numbers: Iterable[int]) -> bytes:
    return b"".join(orjson.dumps(row(number)) + b"\n" for number in numbers)


def entries(source: FileSource) -> list[Entry]:
    return [entry for batch in source.batches() for entry in batch]


def source_at(path: Path, task: str | None = None, max_line_bytes: int = MIB) -> FileSource:
    return FileSource(path, task, SeedsSection(max_line_bytes=max_line_bytes))


def numbers_in(read: Iterable[Entry]) -> list[int]:
    return [entry.metadata["n"] for entry in read if isinstance(entry, Seed)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines_are_read_as_they_stand(tmp_path: Path, suffix: str) -> None:
    """The origin of each seed is its file and line, and its task the file's stem, compressed or not."""
    path = tmp_path / f"trivia{suffix}"
    path.write_bytes(COMPRESS[suffix](jsonl(range(3000))))
    source = source_at(path)

    read = entries(source)

    assert list(range(3000)) == numbers_in(read)
    assert [f"{path}:{line}" for line in range(1, 3001)] == [entry.origin for entry in read]
    assert {"trivia"} == {entry.task for entry in read if isinstance(entry, Seed)}
    assert 1.0 == source.fraction()


def test_a_task_may_be_given(tmp_path: Path) -> None:
    """The task of the source replaces the file's stem; a line's own task wins over both."""
    path = tmp_path / "trivia.jsonl"
    own = orjson.dumps({**row(1), "task": "own"})
    path.write_bytes(jsonl([0]) + own)

    tasks = [entry.task for entry in entries(source_at(path, task="given")) if isinstance(entry, Seed)]

    assert ["given", "own"] == tasks


def test_bad_lines_stand_between_seeds(tmp_path: Path) -> None:
    """A bad line is named by file and line, and the lines after it are read."""
    path = tmp_path / "seeds.jsonl"
    long = b'{"instruction":"' + b"x" * 200 + b'"}\n'
    path.write_bytes(
        b"\xef\xbb\xbf" + jsonl([0]) + b"nix\n\n" + b"\xff\n" + long + b"{}\r\n" + jsonl([1])[:-1]
    )

    read = entries(source_at(path, max_line_bytes=150))

    bad = [(entry.origin, entry.reason) for entry in read if isinstance(entry, BadSeed)]
    assert [
        (f"{path}:2", RejectReason.INVALID_JSON),
        (f"{path}:4", RejectReason.INVALID_UTF8),
        (f"{path}:5", RejectReason.LINE_TOO_LONG),
        (f"{path}:6", RejectReason.NOT_A_SEED),
    ] == bad
    assert [0, 1] == numbers_in(read)


def test_a_line_above_the_limit_is_a_bad_seed(tmp_path: Path) -> None:
    """With its length and the key of the limit."""
    path = tmp_path / "huge.jsonl"
    path.write_bytes(jsonl([0]) + b"x" * 5000 + b"\n" + jsonl([1]))

    read = entries(source_at(path, max_line_bytes=1000))

    assert [Seed, BadSeed, Seed] == [type(entry) for entry in read]
    assert isinstance(read[1], BadSeed)
    assert "5000 bytes, more than seeds.max_line_bytes = 1000" == read[1].detail


def test_a_broken_file_is_refused_after_its_good_seeds(tmp_path: Path) -> None:
    """The message names it."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(range(100))) + b"garbage")
    read: list[Entry] = []

    with pytest.raises(ConfigError) as raised:
        read.extend(entry for batch in source_at(path).batches() for entry in batch)

    assert list(range(100)) == numbers_in(read)
    assert str(raised.value).startswith(f"{path} cannot be read to its end: ")


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_rows_are_numbered_like_lines(tmp_path: Path) -> None:
    """Every row is an entry; a row without an answer is named by file and row."""
    rows = [row(number) for number in range(1000)]
    columns = {name: [line[name] for line in rows] for name in rows[0]}
    columns["answer"][700] = None
    path = write_parquet(tmp_path / "trivia.parquet", columns)
    source = source_at(path)

    read = entries(source)

    assert [number for number in range(1000) if number != 700] == numbers_in(read)
    assert [f"{path}:{number}" for number in range(1, 1001)] == [entry.origin for entry in read]
    assert isinstance(read[700], BadSeed)
    assert {"trivia"} == {entry.task for entry in read if isinstance(entry, Seed)}
    assert 1.0 == source.fraction()


def test_parquet_holds_what_json_does_not(tmp_path: Path) -> None:
    """Times, bytes, decimals and nested values travel along in a form that can be written."""
    import datetime
    import decimal

    columns = {
        "instruction": ["Who?"],
        "answer": ["Ada."],
        "at": [datetime.date(1843, 9, 1)],
        "price": [decimal.Decimal("1.50")],
        "share": [float("nan")],
        "raw": [b"\xff"],
        "tags": [["a", "b"]],
        "more": [{"pages": 3}],
    }
    path = write_parquet(tmp_path / "a.parquet", columns)

    metadata = [entry.metadata for entry in entries(source_at(path)) if isinstance(entry, Seed)]

    expected = {
        "at": "1843-09-01",
        "price": "1.50",
        "share": "NaN",
        "raw": "b'\\xff'",
        "tags": ["a", "b"],
        "more": {"pages": 3},
    }
    assert [expected] == metadata


def test_a_value_that_python_cannot_hold_costs_no_pair(tmp_path: Path) -> None:
    """A date beyond the year 9999 becomes text; an instruction that is not UTF-8 is a bad seed."""
    import pyarrow

    offsets, data = struct.pack("<4i", 0, 4, 6, 10), b"Who?\xff\xfeWhy?"
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(data)]
    )
    times = pyarrow.array([0, 0, 2**62], pyarrow.timestamp("us"))
    columns = {"instruction": texts, "answer": ["a", "b", "c"], "at": times}
    path = write_parquet(tmp_path / "a.parquet", columns)

    read = entries(source_at(path))

    bad = [(entry.origin, entry.reason) for entry in read if isinstance(entry, BadSeed)]
    assert [(f"{path}:2", RejectReason.INVALID_UTF8)] == bad
    assert ["Who?", "Why?"] == [entry.instruction for entry in read if isinstance(entry, Seed)]
    assert isinstance(read[2], Seed)
    assert isinstance(read[2].metadata["at"], str)


@pytest.fixture
def datasets() -> Any:
    """The package, without its progress bars."""
    import datasets

    datasets.disable_progress_bars()
    return datasets


def test_a_saved_dataset_is_read_row_by_row(tmp_path: Path, datasets: Any) -> None:
    """The folder's name is the task; a selection of rows and a saved format make no difference."""
    path = tmp_path / "trivia"
    dataset = datasets.Dataset.from_list([row(number) for number in range(1000)])
    dataset.select(range(999, -1, -1)).with_format("numpy").save_to_disk(path)
    source = source_at(path)

    read = entries(source)

    assert list(range(999, -1, -1)) == numbers_in(read)
    assert [f"{path}:{number}" for number in range(1, 1001)] == [entry.origin for entry in read]
    assert {"trivia"} == {entry.task for entry in read if isinstance(entry, Seed)}
    assert 1.0 == source.fraction()


def test_a_saved_dataset_is_read_split_by_split(tmp_path: Path, datasets: Any) -> None:
    """The origin of each row names its split."""
    path = tmp_path / "trivia"
    train, test = datasets.Dataset.from_list([row(0), row(1)]), datasets.Dataset.from_list([row(2)])
    datasets.DatasetDict(train=train, test=test).save_to_disk(path)

    read = entries(source_at(path))

    assert [0, 1, 2] == numbers_in(read)
    assert [f"{path}[train]:1", f"{path}[train]:2", f"{path}[test]:1"] == [entry.origin for entry in read]


def test_a_name_that_is_not_utf8_is_written_with_escapes(tmp_path: Path) -> None:
    """So that the log can hold the origin and the task of its seeds, and of its bad lines."""
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    path.write_bytes(orjson.dumps(row(0)) + b"\n{broken\n")

    seed, bad = entries(source_at(path))

    assert isinstance(seed, Seed)
    assert "caf\\udce9" == seed.task
    assert [f"{tmp_path}/caf\\udce9.jsonl:{number}" for number in (1, 2)] == [seed.origin, bad.origin]
    assert orjson.dumps([seed, bad], default=bytes.hex)
