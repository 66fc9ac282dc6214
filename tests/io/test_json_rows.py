"""JSON files: arrays read element by element, exact numbers, and files that are not what they seem."""

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.errors import ConfigError
from streamsyn.io.content import HEAD_BYTES, Layout, layout_of, problem_of
from streamsyn.io.inputs import decode_all, open_rows
from streamsyn.io.json_rows import decode_json
from streamsyn.io.rows import ReadOptions, RowReader, TableRow
from tests.examples import examples, in_turn

MIB = 2**20
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(), below, max_size=3),
    max_leaves=8,
)


def rows_of(path: Path, **options: Any) -> list[Any]:
    return [value for _, value in decode_all(path, ReadOptions(**options))]


def table_rows(reader: RowReader) -> Iterator[TableRow]:
    for batch in reader.batches():
        for row in batch.rows:
            assert isinstance(row, TableRow)
            yield row


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_an_array_is_read_in_bounded_memory(tmp_path: Path, indent: int | None, pack: Any) -> None:
    """Element by element, numbered from 1; rows of several chunks too."""
    path = tmp_path / "pairs.json"
    rows = [{"n": n, "text": "x" * (900_000 if n == 7 else 2000)} for n in range(4000)]
    path.write_bytes(pack(b"\xef\xbb\xbf" + json.dumps(rows, indent=indent).encode()))
    reader = open_rows(path, ReadOptions(batch_rows=100))

    tracemalloc.start()
    read = [(row.number, row.value["n"]) for row in table_rows(reader)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert [(n + 1, n) for n in range(4000)] == read
    assert 1.0 == reader.fraction()
    assert peak < 10 * MIB
    assert rows == rows_of(path)


@examples(200)
@given(
    rows=st.lists(st.dictionaries(st.text(), VALUES, max_size=3), max_size=8), indent=st.none() | st.just(1)
)
def test_any_array_is_read_as_json_reads_it(
    tmp_path_factory: Any, rows: list[Any], indent: int | None
) -> None:
    """Whatever its rows hold."""
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_bytes(json.dumps(rows, indent=indent).encode())

    assert rows == rows_of(path)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'[{"a": 1}, {"a": 2', ":2 is not valid JSON"),
        (b'[{"a": 1}\n {"a": 2}]', ":1 is not a valid JSON array: it has '{' where , or ] belongs"),
        (b'[{"a": 1}', ":1 is not a valid JSON array: it ends where , or ] belongs"),
        (b'[{"a": 1}]\n{"a": 2}', None),
        (b'[\n{"a": 1}]\n{"a": 2}', ":1 has '{' behind its end"),
        (b'[{"a": 1},]', ":2 is not valid JSON"),
        (b'[{"a": "caf\xe9 au lait"}]', " is Latin-1 (or Windows-1252), not UTF-8; convert it: iconv"),
        (b'[\n{"a": "' + b"x" * 300_000 + b'"}]', ":1 is longer than 1000 bytes, or not valid JSON"),
    ],
)
def test_a_damaged_array_is_named(tmp_path: Path, data: bytes, problem: str | None) -> None:
    """With the element; lines that each hold a list are lines."""
    path = tmp_path / "a.json"
    path.write_bytes(data)
    if problem is None:
        assert [[{"a": 1}], {"a": 2}] == rows_of(path)
        return
    with pytest.raises(ConfigError) as raised:
        rows_of(path, max_line_bytes=1000)

    assert str(raised.value).startswith(f"{path}{problem}")


def test_elements_that_are_not_objects_are_bad_rows(tmp_path: Path) -> None:
    """Each by itself; an empty array has no rows."""
    path, empty = tmp_path / "a.json", tmp_path / "b.json"
    path.write_bytes(b'[{"a": 1}, 2, "x", [], {"a": 3}]')
    empty.write_bytes(b"[ ]\n")

    errors = [str(row.error).rsplit(" ", 1)[-1] for row in table_rows(open_rows(path, ReadOptions()))]

    assert ["None", "int", "str", "list", "None"] == errors
    assert 0 == open_rows(empty, ReadOptions()).count()


@in_turn(
    ("text", "value"),
    [
        ("18446744073709551616", 2**64),
        ("-9223372036854775809", -(2**63) - 1),
        ('{"a": [100000000000000000000000000001]}', {"a": [10**29 + 1]}),
        ("9" * 5000, "9" * 5000),
        ("1e400", "1e400"),
        ("NaN", "NaN"),
        ('{"a": -Infinity}', {"a": "-Infinity"}),
        ("1.5", 1.5),
        ('"1234567890123456789012"', "1234567890123456789012"),
    ],
)
def test_numbers_are_exact_or_text(text: str, value: Any) -> None:
    """Beyond 64 bits, infinite, and what Python writes for no number."""
    assert value == decode_json(text.encode())
    assert type(value) is type(decode_json(text.encode()))


@examples(200)
@given(st.binary() | VALUES.map(lambda value: json.dumps(value).encode()))
def test_what_is_not_json_is_refused(text: bytes) -> None:
    """With orjson's error; all that `json` accepts is read as it reads it."""
    try:
        value = decode_json(text)
    except orjson.JSONDecodeError:
        with pytest.raises(ValueError):  # noqa: PT011 - of the decoder or of the encoding
            json.loads(text.decode())
        return
    assert json.loads(text.decode()) == value


def lines(*texts: str) -> bytes:
    return "\n".join(orjson.dumps({"text": text}).decode() for text in texts).encode()


@in_turn(
    ("data", "problem"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a Git LFS pointer"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16, not UTF-8; convert it: iconv -f UTF-16"),
        ('{"a": "long enough"}'.encode("utf-16-le"), "is UTF-16, not UTF-8"),
        (b"PK\x03\x04rest", "is a zip archive"),
        (b"PAR1rest", "is Parquet"),
        (b"\n<!DOCTYPE html>\n<html>", "is an HTML page"),
        ('{"text": "caf\u00e9"}\n{"text": "na\u00efve"}'.encode("latin-1"), "is Latin-1 (or Windows-1252)"),
        (lines("\u00fcber", "plain") + b'\n{"text": "caf\xe9"}', None),  # one bad line among UTF-8
        (lines("a", "b", "c") + b'\n{"text": "caf\xe9"}', None),
        (b"\xff\n" + lines("a"), None),
        (lines("\u4e2d" * HEAD_BYTES)[:HEAD_BYTES], None),  # cut within a character
        (b"", None),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_is_known_by_its_beginning(data: bytes, problem: str | None) -> None:
    """One line says what it is and what to do; a file with a single bad line is not wrong as a whole."""
    found = problem_of(data)

    assert (found is None) == (problem is None)
    assert found is None or found.startswith(problem or "")


@in_turn(
    ("head", "layout"),
    [
        (b'{"a": 1}\n{"a": 2}', Layout.LINES),
        (b'{"a": 1}', Layout.LINES),
        (b'{"a": 1\n{"a": 2}\n{"a": 3}', Layout.LINES),  # a first line that is damaged
        (b'{"a": "b\n{"a": "c"}', Layout.LINES),
        (b'{\n  "a": 1\n}', Layout.DOCUMENT),
        (b'{"data": [' + b'{"a": 1},\n' * HEAD_BYTES, Layout.DOCUMENT),
        (b'{"data":\n "' + b"x" * HEAD_BYTES, Layout.DOCUMENT),
        (b'  [{"a": 1}]\n', Layout.ARRAY),
        (b"[\n", Layout.ARRAY),
        (b"[1]\n[2]", Layout.LINES),
        (b"nix\n[1]", Layout.LINES),
        (b"", Layout.LINES),
    ],
)
def test_the_layout_is_known_by_the_beginning(head: bytes, layout: Layout) -> None:
    """Lines, an array, or one object; a damaged first line is a bad line."""
    assert layout is layout_of(head[:HEAD_BYTES])
