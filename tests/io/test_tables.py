"""CSV and TSV: text values by the names of the first line."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from streamsyn.errors import ConfigError
from streamsyn.io.inputs import decode_all, open_rows
from streamsyn.io.rows import ReadOptions


def places_and_rows(path: Path, data: bytes, **options: Any) -> list[tuple[str, Any]]:
    path.write_bytes(data)
    return [(where.removeprefix(str(path)), row) for where, row in decode_all(path, ReadOptions(**options))]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b'\xef\xbb\xbfq, a\r\n"Who, then?",007\r\n\r\n"two\nlines",b\r\n'),
        ("A.CSV.GZ", gzip.compress(b'q;a\n"Who, then?";007\n\n"two\nlines";b', mtime=0)),
        ("a.tsv", b'q\ta\nWho, then?\t007\n\n"two\nlines"\tb\n'),
        ("a.csv", b'q\ta\nWho, then?\t007\n\n"two\nlines"\tb\n'),
    ],
)
def test_each_value_is_text(tmp_path: Path, name: str, data: bytes) -> None:
    """Numbers keep their zeros, values may have several lines; a row's place is its first line."""
    expected = [(":2", {"q": "Who, then?", "a": "007"}), (":4", {"q": "two\nlines", "a": "b"})]

    assert expected == places_and_rows(tmp_path / name, data)
    assert 2 == open_rows(tmp_path / name, ReadOptions()).count()


def test_long_tables_come_in_batches(tmp_path: Path) -> None:
    """With the share that was read; characters lie across chunks."""
    path = tmp_path / "a.csv"
    text = "\u00e9" * 200
    path.write_text("n,text\n" + "".join(f"{n},{text}\n" for n in range(3000)))
    reader = open_rows(path, ReadOptions(batch_rows=100))

    assert [100] * 30 == [len(batch.rows) for batch in reader.batches()]
    assert 1.0 == reader.fraction()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"a,b\n1,2\n1,2,3\n", ":3 cannot be read: it has 3 values, and there are 2 columns"),
        (b"a,a\n1,2\n", " has two columns of the name 'a'"),
        ("a,b\n1,caf\u00e9\nna\u00efve,2\n".encode("latin-1"), " is Latin-1 (or Windows-1252), not UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), " is UTF-16, not UTF-8"),
        (
            b'a,b\n"' + b"x" * 2000 + b"\n",
            ":2 cannot be read as delimited text: field larger",
        ),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, data: bytes, problem: str) -> None:
    """By its line where there is one."""
    path = tmp_path / "a.csv"
    with pytest.raises(ConfigError) as raised:
        places_and_rows(path, data, max_line_bytes=1000)

    assert str(raised.value).startswith(f"{path}{problem}")


def test_a_short_row_lacks_its_last_fields(tmp_path: Path) -> None:
    """An empty file has no rows."""
    assert [(":2", {"a": "1"})] == places_and_rows(tmp_path / "a.csv", b"a,b\n1\n")
    assert [] == places_and_rows(tmp_path / "b.csv", b"")
