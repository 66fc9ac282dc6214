"""Seeds in files of every kind: the same seeds, their places, and what becomes of broken files."""

import gzip
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard

from streamsyn.config.sections import SeedsSection
from streamsyn.errors import ConfigError
from streamsyn.records import BadSeed, Entry, RejectReason, Seed
from streamsyn.seeds.files import JsonLinesSource, ParquetSource, SavedDatasetSource, SeedSource, is_seed_file

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


def entries(source: SeedSource) -> list[Entry]:
    return [entry for batch in source.batches() for entry in batch]


def read_until_it_breaks(source: SeedSource) -> tuple[list[Entry], str]:
    """What a broken source yields, and how it says that it is broken."""
    read: list[Entry] = []
    with pytest.raises(ConfigError) as raised:
        read.extend(entry for batch in source.batches() for entry in batch)
    return read, str(raised.value)


def source_at(path: Path, task: str | None = None, max_line_bytes: int = MIB) -> SeedSource:
    seeds = SeedsSection(max_line_bytes=max_line_bytes)
    if path.is_dir():
        return SavedDatasetSource(path, task, seeds)
    if path.suffix == ".parquet":
        return ParquetSource(path, task, seeds)
    return JsonLinesSource(path, task, seeds)


def numbers_in(read: Iterable[Entry]) -> list[int]:
    return [entry.metadata["n"] for entry in read if isinstance(entry, Seed)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines_are_read_as_they_stand(tmp_path: Path, suffix: str) -> None:
    """Each seed says its file and line and has the file's stem as its task, compressed or not."""
    path = tmp_path / f"trivia{suffix}"
    path.write_bytes(COMPRESS[suffix](jsonl(range(3000))))
    source = source_at(path)

    read = entries(source)

    assert list(range(3000)) == numbers_in(read)
    assert [f"{path}:{line}" for line in range(1, 3001)] == [entry.origin for entry in read]
    assert {"trivia"} == {entry.task for entry in read if isinstance(entry, Seed)}
    assert 1.0 == source.fraction()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_an_empty_file_holds_no_seeds(tmp_path: Path, suffix: str) -> None:
    """Neither does a compressed one; a file without a single byte is as good."""
    path, bare = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    path.write_bytes(COMPRESS[suffix](b""))
    bare.write_bytes(b"")

    assert [[], []] == [entries(source_at(path)), entries(source_at(bare))]


def test_a_task_may_be_given(tmp_path: Path) -> None:
    """The source's task stands in for the file's stem; a line's own task wins over both."""
    path = tmp_path / "trivia.jsonl"
    own = orjson.dumps({**row(1), "task": "own"})
    path.write_bytes(jsonl([0]) + own)

    tasks = [entry.task for entry in entries(source_at(path, task="given")) if isinstance(entry, Seed)]

    assert ["given", "own"] == tasks


def test_bad_lines_stand_between_seeds(tmp_path: Path) -> None:
    """A line that is no seed is named by file and line, and the ones behind it are read."""
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


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_huge_line_is_refused_in_bounded_memory(tmp_path: Path, suffix: str) -> None:
    """50 MB without a line end are counted, not held, also where they are compressed to a few bytes."""
    path = tmp_path / f"huge{suffix}"
    with path.open("wb") as file:
        file.write(
            COMPRESS[suffix](jsonl([0]) + b'{"instruction":"' + b"x" * 50_000_000 + b'"}\n' + jsonl([1]))
        )
    source = source_at(path)

    tracemalloc.start()
    read = entries(source)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert [Seed, BadSeed, Seed] == [type(entry) for entry in read]
    assert isinstance(read[1], BadSeed)
    assert f"50000018 bytes, more than seeds.max_line_bytes = {MIB}" == read[1].detail
    assert peak < 6 * MIB


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_parts_compressed_one_by_one_are_one_file(tmp_path: Path, suffix: str) -> None:
    """`cat a.gz b.gz` is a valid file, and so is what appends a frame at a time, empty ones too."""
    path = tmp_path / f"a{suffix}"
    data = jsonl(range(100))
    parts = [data[:50], data[50:1000], b"", data[1000:]]
    path.write_bytes(b"".join(COMPRESS[suffix](part) for part in parts))

    assert list(range(100)) == numbers_in(entries(source_at(path)))


def test_skippable_zstd_frames_are_skipped(tmp_path: Path) -> None:
    """`pzstd` and others put frames between the data that are not for reading."""
    path = tmp_path / "a.jsonl.zst"
    note = struct.pack("<II", 0x184D2A50, 4) + b"note"
    path.write_bytes(note + zstandard.compress(jsonl([0])) + note + zstandard.compress(jsonl([1])) + note)

    assert [0, 1] == numbers_in(entries(source_at(path)))


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01])
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_file_cut_short_is_refused_after_its_good_seeds(tmp_path: Path, suffix: str, kept: float) -> None:
    """An unfinished download must not pass for a whole file; no half line is taken for a bad one."""
    path = tmp_path / f"a{suffix}"
    data = COMPRESS[suffix](jsonl(range(20_000)))
    path.write_bytes(data[: int(len(data) * kept)])

    read, message = read_until_it_breaks(source_at(path))

    assert list(range(len(read))) == numbers_in(read)
    assert 20_000 * kept * 0.7 - 1500 < len(read) < 20_000
    assert message.startswith(f"{path} cannot be read to its end: ")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_garbage_behind_the_data_is_refused_after_the_good_seeds(tmp_path: Path, suffix: str) -> None:
    """All seeds before the garbage come through first."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](jsonl(range(100))) + b"garbage")

    read, message = read_until_it_breaks(source_at(path))

    assert list(range(100)) == numbers_in(read)
    assert message.startswith(f"{path} cannot be read to its end: ")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_file_of_another_kind_than_its_name_is_refused(tmp_path: Path, suffix: str) -> None:
    """The message names the file."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(jsonl(range(10)))

    read, message = read_until_it_breaks(source_at(path))

    assert [] == read
    assert message.startswith(f"{path} cannot be read to its end")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", True),
        ("a.ndjson", True),
        ("a.json", True),
        ("a.jsonl.gz", True),
        ("a.json.zst", True),
        ("a.parquet", True),
        ("a.parquet.gz", False),
        ("a.gz", False),
        ("a.csv", False),
        ("jsonl", False),
    ],
)
def test_kinds_are_told_by_names(name: str, expected: bool) -> None:
    """Only what can be read is taken from a folder."""
    assert expected == is_seed_file(Path(name))


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
        "share": None,
        "raw": "b'\\xff'",
        "tags": ["a", "b"],
        "more": {"pages": 3},
    }
    assert [expected] == metadata


def test_a_value_that_python_cannot_hold_spoils_its_own_row_alone(tmp_path: Path) -> None:
    """Text that is no UTF-8, or a date beyond the year 9999, is a bad seed among good ones."""
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
    assert [(f"{path}:2", RejectReason.INVALID_UTF8), (f"{path}:3", RejectReason.NOT_A_SEED)] == bad
    assert ["Who?"] == [entry.instruction for entry in read if isinstance(entry, Seed)]


def test_parquet_cut_short_is_refused(tmp_path: Path) -> None:
    """Its index stands at its end: without it nothing can be read."""
    path = write_parquet(tmp_path / "a.parquet", {"instruction": ["Who?"], "answer": ["Ada."]})
    path.write_bytes(path.read_bytes()[:-10])

    _, message = read_until_it_breaks(source_at(path))

    assert message.startswith(f"{path} cannot be read to its end as Parquet: ")


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
    """Each row says the split in which it stands."""
    path = tmp_path / "trivia"
    train, test = datasets.Dataset.from_list([row(0), row(1)]), datasets.Dataset.from_list([row(2)])
    datasets.DatasetDict(train=train, test=test).save_to_disk(path)

    read = entries(source_at(path))

    assert [0, 1, 2] == numbers_in(read)
    assert [f"{path}[train]:1", f"{path}[train]:2", f"{path}[test]:1"] == [entry.origin for entry in read]


@pytest.mark.parametrize("broken", ["{}", "nix", "[]"])
def test_a_broken_saved_dataset_is_refused(tmp_path: Path, datasets: Any, broken: str) -> None:
    """The message names the folder, whatever is wrong in it."""
    path = tmp_path / "trivia"
    datasets.DatasetDict(train=datasets.Dataset.from_list([row(0)])).save_to_disk(path)
    (path / "dataset_dict.json").write_text(broken)

    _, message = read_until_it_breaks(source_at(path))

    assert message.startswith(f"{path} cannot be read as a saved dataset: ")


def test_a_saved_dataset_cut_short_is_refused(tmp_path: Path, datasets: Any) -> None:
    """A table that ends early is no dataset."""
    path = tmp_path / "trivia"
    datasets.Dataset.from_list([row(0)]).save_to_disk(path)
    [table] = path.glob("*.arrow")
    table.write_bytes(table.read_bytes()[:200])

    _, message = read_until_it_breaks(source_at(path))

    assert message.startswith(f"{path} cannot be read as a saved dataset: ")
