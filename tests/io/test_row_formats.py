"""Rows of files in every format: the same rows, their places, and what becomes of damaged files."""

import bz2
import csv
import gzip
import io
import lzma
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from streamsyn.errors import ConfigError
from streamsyn.io.content import read_text
from streamsyn.io.inputs import decode_all, open_rows
from streamsyn.io.rows import Line, ReadOptions, TableRow, is_blank

MIB = 2**20
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.compress,
    ".jsonl.bz2": bz2.compress,
    ".jsonl.xz": lzma.compress,
}


def row(number: int) -> dict[str, Any]:
    noise = random.Random(number).randbytes(30).hex()  # so that it does not compress to nothing
    return {"text": noise, "n": number}


def jsonl(numbers: Iterable[int]) -> bytes:
    return b"".join(orjson.dumps(row(number)) + b"\n" for number in numbers)


def rows_of(path: Path, **options: Any) -> list[Any]:
    return [value for _, value in decode_all(path, ReadOptions(**options))]


def numbers_in(rows: Iterable[Any]) -> list[int]:
    return [one["n"] for one in rows]


def read_until_it_breaks(path: Path) -> tuple[list[Any], str]:
    """The rows of a broken file, and the message that it is broken."""
    rows: list[Any] = []
    with pytest.raises(ConfigError) as raised:
        rows.extend(value for _, value in decode_all(path, ReadOptions()))
    return rows, str(raised.value)


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def delimited(rows: list[dict[str, Any]], delimiter: str) -> str:
    """A table of the rows, with a field of several lines."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def written(folder: Path, form: str) -> Path:
    """300 rows in a file of one format."""
    import datasets

    path = folder / f"rows{form}"
    if form == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row(n) for n in range(300)]), path)
    elif form in {".csv", ".tsv"}:
        path.write_text(delimited([row(n) for n in range(300)], "\t" if form == ".tsv" else ","))
    elif form == ".json":
        path.write_bytes(orjson.dumps([row(n) for n in range(300)], option=orjson.OPT_INDENT_2))
    elif form == "_saved":
        datasets.Dataset.from_list([row(n) for n in range(300)]).save_to_disk(path)
    else:
        path.write_bytes(COMPRESS[form](jsonl(range(300))))
    return path


@pytest.mark.parametrize("form", [*COMPRESS, ".json", ".parquet", "_saved"])
def test_every_format_gives_the_same_rows(tmp_path: Path, form: str) -> None:
    """In bounded batches, numbered from 1, counted without being decoded, with the share that was read."""
    path = written(tmp_path, form)
    reader = open_rows(path, ReadOptions(batch_rows=100))

    numbers = [one.number for batch in reader.batches() for one in batch.rows]

    assert [row(number) for number in range(300)] == rows_of(path)
    assert list(range(1, 301)) == numbers
    assert 1.0 == reader.fraction()
    assert 300 == reader.count()
    assert f"{path}:300" == list(decode_all(path, ReadOptions()))[-1][0]


def test_lines_are_not_decoded_and_blank_ones_keep_their_numbers(tmp_path: Path) -> None:
    """What a bad line means is for the caller to say; blank lines are not counted as rows."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf{}\r\n \n\nno json\n" + b"x" * 60 + b"\n[]")
    reader = open_rows(path, ReadOptions(max_line_bytes=50))

    rows = [one for batch in reader.batches() for one in batch.rows if not is_blank(one)]

    assert [Line(1, b"{}", 6), Line(4, b"no json", 7), Line(5, None, 60), Line(6, b"[]", 2)] == rows
    assert 4 == reader.count()


def test_the_splits_of_a_saved_dataset_are_read_in_turn(tmp_path: Path) -> None:
    """Each row says the split that it is in; a selection of rows and a format make no difference."""
    import datasets

    path = tmp_path / "saved"
    train, test = datasets.Dataset.from_list([row(0), row(1)]), datasets.Dataset.from_list([row(2)])
    datasets.DatasetDict(train=train.select([1, 0]).with_format("numpy"), test=test).save_to_disk(path)

    places = [(place.removeprefix(str(path)), value["n"]) for place, value in decode_all(path, ReadOptions())]

    assert [("[train]:1", 1), ("[train]:2", 0), ("[test]:1", 2)] == places
    assert 3 == open_rows(path, ReadOptions()).count()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_huge_line_takes_bounded_memory(tmp_path: Path, suffix: str) -> None:
    """20 MB without a line end are counted, not held, also where they are compressed to a few bytes."""
    path = tmp_path / f"huge{suffix}"
    path.write_bytes(COMPRESS[suffix](b"{}\n" + b"x" * 20_000_000 + b"\n{}\n"))
    reader = open_rows(path, ReadOptions(max_line_bytes=MIB))

    tracemalloc.start()
    lines = [one for batch in reader.batches() for one in batch.rows]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert [Line(1, b"{}", 2), Line(2, None, 20_000_000), Line(3, b"{}", 2)] == lines
    assert peak < (14 if suffix == ".jsonl.xz" else 6) * MIB  # the window of xz is 8 MiB


def test_a_value_that_python_cannot_hold_becomes_text(tmp_path: Path) -> None:
    """A date beyond the year 9999: its row has it as Arrow writes it; others are untouched."""
    times = pyarrow.array([0, 2**62, 0], pyarrow.timestamp("us"))
    path = write_parquet(tmp_path / "a.parquet", {"at": times, "n": [1, 2, 3]})

    rows = [one for batch in open_rows(path, ReadOptions()).batches() for one in batch.rows]

    assert [[], ["at"], []] == [list(one.unreadable) for one in rows if isinstance(one, TableRow)]
    assert [1, 2, 3] == [one["n"] for one in rows_of(path)]
    assert isinstance(rows_of(path)[1]["at"], str)


def test_only_the_columns_that_are_named_are_read(tmp_path: Path) -> None:
    """One that is missing is named, with the key that asked for it."""
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a", "b"], "n": [1, 2]})

    assert [{"n": 1}, {"n": 2}] == rows_of(path, columns={"n": "some.key"})
    with pytest.raises(
        ConfigError, match=r"a\.parquet has no column 'm', which some\.key names; it has text, n"
    ):
        rows_of(path, columns={"m": "some.key"})


def test_a_document_is_one_row_where_documents_are_accepted(tmp_path: Path) -> None:
    """An object over several lines; elsewhere the file is refused before its first row, with what to do."""
    document = tmp_path / "a.json.gz"
    data = orjson.dumps({"rows": [row(n) for n in range(2000)]}, option=orjson.OPT_INDENT_2)
    document.write_bytes(gzip.compress(b"\xef\xbb\xbf" + data))

    rows = list(decode_all(document, ReadOptions(documents=True)))

    assert [(f"{document}:1", orjson.loads(data))] == rows
    with pytest.raises(ConfigError, match=r"a\.json\.gz is a JSON object over several lines; give an array"):
        rows_of(document)
    document.write_bytes(gzip.compress(data[:-3] + b"!"))
    with pytest.raises(ConfigError, match=r"a\.json\.gz:\d+ is not valid JSON"):
        rows_of(document, documents=True)


def test_a_line_above_the_limit_is_refused_by_who_decodes_all(tmp_path: Path) -> None:
    """With the key, the place and the limit."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + b" " * 60)

    with pytest.raises(ConfigError, match=r"^key: .*a\.jsonl:2 is longer than 50 bytes$"):
        rows_of(path, max_line_bytes=50, key="key")


def test_text_is_decoded_in_pieces(tmp_path: Path) -> None:
    """A character may lie across two chunks, a byte order mark is dropped, other encodings are refused."""
    path = tmp_path / "a.txt.gz"
    text = "xé" * 200_000
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    pieces = list(read_text(path, ReadOptions()))

    assert text == "".join(pieces)
    assert len(pieces) > 2
    path.write_bytes(gzip.compress(text.encode("latin-1")))
    with pytest.raises(ConfigError, match=r"a\.txt\.gz is not valid UTF-8"):
        list(read_text(path, ReadOptions()))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """It may go between being found and being read."""
    for path in (tmp_path / "a.jsonl", tmp_path / "a.parquet"):
        with pytest.raises(ConfigError, match=rf"{path} cannot be read"):
            rows_of(path)
    with pytest.raises(ConfigError, match=r"a\.txt cannot be read"):
        list(read_text(tmp_path / "a.txt", ReadOptions()))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_an_empty_file_has_no_rows(tmp_path: Path, suffix: str) -> None:
    """Neither does a compressed one; a file without a single byte is as good."""
    path, bare = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    path.write_bytes(COMPRESS[suffix](b""))
    bare.write_bytes(b"")

    assert [[], []] == [rows_of(path), rows_of(bare)]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_parts_compressed_one_by_one_are_one_file(tmp_path: Path, suffix: str) -> None:
    """`cat a.gz b.gz` is a valid file, and so is what appends a frame at a time, empty ones too."""
    path = tmp_path / f"a{suffix}"
    data = jsonl(range(100))
    parts = [data[:50], data[50:1000], b"", data[1000:]]
    path.write_bytes(b"".join(COMPRESS[suffix](part) for part in parts))

    assert list(range(100)) == numbers_in(rows_of(path))


def test_skippable_zstd_frames_are_skipped(tmp_path: Path) -> None:
    """`pzstd` and others put frames between the data that are not for reading."""
    path = tmp_path / "a.jsonl.zst"
    note = struct.pack("<II", 0x184D2A50, 4) + b"note"
    path.write_bytes(note + zstandard.compress(jsonl([0])) + note + zstandard.compress(jsonl([1])) + note)

    assert [0, 1] == numbers_in(rows_of(path))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz"])
def test_a_file_cut_short_is_refused_after_its_good_rows(tmp_path: Path, suffix: str) -> None:
    """An unfinished download must not pass for a whole file; no half line is taken for a bad one."""
    path = tmp_path / f"a{suffix}"
    data = COMPRESS[suffix](jsonl(range(12_000)))
    for kept in (0.999, 0.5, 0.01):
        path.write_bytes(data[: int(len(data) * kept)])

        rows, message = read_until_it_breaks(path)

        assert list(range(len(rows))) == numbers_in(rows)
        assert len(rows) < 12_000
        if suffix not in {".jsonl.bz2", ".jsonl.xz"}:  # which come in blocks of up to a megabyte
            assert 12_000 * kept * 0.7 - 1500 < len(rows)
        assert message.startswith(f"{path} cannot be read to its end: ")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_garbage_behind_the_data_is_refused_after_the_good_rows(tmp_path: Path, suffix: str) -> None:
    """All rows before the garbage come through first."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](jsonl(range(100))) + b"garbage")

    rows, message = read_until_it_breaks(path)

    assert list(range(100)) == numbers_in(rows)
    assert message.startswith(f"{path} cannot be read to its end: ")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "A.JSONL.XZ", "a.Json"])
@pytest.mark.parametrize("compression", COMPRESS)
def test_compression_is_told_by_content(tmp_path: Path, name: str, compression: str) -> None:
    """Whatever the name says: files are renamed, and unpacked on their way."""
    path = tmp_path / name
    path.write_bytes(COMPRESS[compression](jsonl(range(10))))

    assert list(range(10)) == numbers_in(rows_of(path))


def test_a_file_of_another_kind_than_its_name_is_refused(tmp_path: Path) -> None:
    """The message names the file."""
    path = tmp_path / "a.parquet"
    path.write_bytes(jsonl(range(10)))

    rows, message = read_until_it_breaks(path)

    assert [] == rows
    assert message.startswith(f"{path} cannot be read to its end")


def test_parquet_cut_short_is_refused(tmp_path: Path) -> None:
    """Its index stands at its end: without it nothing can be read."""
    path = write_parquet(tmp_path / "a.parquet", {"instruction": ["Who?"], "answer": ["Ada."]})
    path.write_bytes(path.read_bytes()[:-10])

    _, message = read_until_it_breaks(path)

    assert message.startswith(f"{path} cannot be read to its end as Parquet: ")


@pytest.fixture
def datasets() -> Any:
    """The package, without its progress bars."""
    import datasets

    datasets.disable_progress_bars()
    return datasets


@pytest.mark.parametrize("broken", ["{}", "nix", "[]"])
def test_a_broken_saved_dataset_is_refused(tmp_path: Path, datasets: Any, broken: str) -> None:
    """The message names the folder, whatever is wrong in it."""
    path = tmp_path / "trivia"
    datasets.DatasetDict(train=datasets.Dataset.from_list([row(0)])).save_to_disk(path)
    (path / "dataset_dict.json").write_text(broken)

    _, message = read_until_it_breaks(path)

    assert message.startswith(f"{path} cannot be read as a saved dataset: ")


def test_a_saved_dataset_cut_short_is_refused(tmp_path: Path, datasets: Any) -> None:
    """A table that ends early is no dataset."""
    path = tmp_path / "trivia"
    datasets.Dataset.from_list([row(0)]).save_to_disk(path)
    [table] = path.glob("*.arrow")
    table.write_bytes(table.read_bytes()[:200])

    _, message = read_until_it_breaks(path)

    assert message.startswith(f"{path} cannot be read as a saved dataset: ")
