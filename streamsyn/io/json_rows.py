"""Rows of JSON files: one value a line, one array, or one object; numbers beyond 64 bits and NaN are kept.

Here too: values of any kind of row as JSON can hold them (`storable`).
"""

import codecs
import datetime
import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Final

import orjson

from streamsyn.io.content import HEAD_BYTES, READ_ERRORS, Layout, file_chunks, layout_of, problem_of
from streamsyn.io.places import RemoteFile
from streamsyn.io.rows import Batch, ReadOptions, TableRow, is_blank, split_lines

_SHAPE: Final = bytes.maketrans(b"123456789E", b"000000000e")
_INEXACT: Final = (b"0" * 19, b"0e000", b"0e+000")
"""In the shape of texts with numbers that orjson reads as floats with fewer digits, or as infinity."""
_SHALLOW: Final = 200
"""Opening brackets with which a value can be written wherever it goes: orjson's nesting is limited."""
_SPACE: Final = re.compile(r"\s*")
_MAX_DEPTH: Final = 200
"""Levels of nesting that are kept: JSON's nesting is limited, and the log puts levels of its own around."""
_LEAST, _MOST = -(2**63), 2**64 - 1
"""Integers that can be written as numbers."""
_NOT_FINITE: Final = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
"""As JSON files that Python has written spell them."""


class JsonReader:
    """A file of JSON values, compressed or not."""

    def __init__(self, place: Path | RemoteFile, options: ReadOptions) -> None:
        self._place = place
        self._options = options
        self._size = options.size_of(place)
        self._position = 0

    def batches(self) -> Iterator[Batch]:
        source = str(self._place)
        try:
            chunks = file_chunks(self._place, self._note_position)
            head, chunks = _with_head(chunks)
            match self._layout(head):
                case Layout.ARRAY:
                    for rows in _array_batches(chunks, self._options, source):
                        yield Batch(source, rows)
                case Layout.DOCUMENT:
                    yield Batch(source, [TableRow(1, _document(chunks, self._options, source))])
                case Layout.LINES:
                    for lines in split_lines(chunks, self._options.max_line_bytes):
                        yield Batch(source, lines)
        except READ_ERRORS as error:
            raise self._options.error(source, f"cannot be read to its end: {error}") from error

    def check(self) -> None:
        if isinstance(self._place, RemoteFile):
            return
        try:
            self._layout(_with_head(file_chunks(self._place))[0])
        except READ_ERRORS as error:
            raise self._options.error(self._place, f"cannot be read to its end: {error}") from error

    def count(self) -> int:
        return sum(not is_blank(row) for batch in self.batches() for row in batch.rows)

    def fraction(self) -> float | None:
        if self._size is None:
            return None
        return self._position / self._size if self._size else 1.0

    def _layout(self, head: bytes) -> Layout:
        if (problem := problem_of(head)) is not None:
            raise self._options.error(self._place, problem)
        layout = layout_of(head)
        if layout is Layout.DOCUMENT and not self._options.documents:
            problem = "is a JSON object over several lines; give an array, or one object a line (jq -c .)"
            raise self._options.error(self._place, problem)
        return layout

    def _note_position(self, offset: int) -> None:
        self._position = offset


def decode_json(text: bytes) -> Any:
    """The value of a JSON text. Numbers are kept exactly, or as text where a float would be infinite.

    NaN and Infinity, which Python and pandas write, become text.

    Raises:
        orjson.JSONDecodeError: It is not valid JSON.
    """
    return decode_row(text)[0]


def decode_row(text: bytes) -> tuple[Any, bool]:
    """The value of a JSON text, as `decode_json` returns it, and whether orjson can write it as it is.

    Raises:
        orjson.JSONDecodeError: It is not valid JSON.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        try:
            return _DECODER.decode(text.decode()), False
        except (ValueError, RecursionError):
            raise error from None
    shape = text.translate(_SHAPE)
    if not any(part in shape for part in _INEXACT):
        return value, text.count(b"[") + text.count(b"{") < _SHALLOW
    try:
        return _DECODER.decode(text.decode()), False
    except RecursionError:
        return value, False


def _integer(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:  # Python refuses to convert thousands of digits
        return digits


def _float(digits: str) -> float | str:
    number = float(digits)
    return number if math.isfinite(number) else digits


_DECODER: Final = json.JSONDecoder(parse_int=_integer, parse_float=_float, parse_constant=str)


def storable(value: Any, depth: int = 0) -> Any:
    """A value that JSON can hold; others become text, such as dates and integers beyond 64 bits."""
    match value:
        case None | bool():
            return value
        case str():
            return text_of(value)
        case int():
            return value if _LEAST <= value <= _MOST else str(value)
        case float():
            return value if math.isfinite(value) else _NOT_FINITE[str(value)]
        case dict() | list() | tuple() | set() if depth >= _MAX_DEPTH:
            return f"a value nested more than {_MAX_DEPTH} levels deep"
        case dict():
            return {text_of(str(name)): storable(one, depth + 1) for name, one in value.items()}
        case list() | tuple() | set():
            return [storable(one, depth + 1) for one in value]
        case datetime.date() | datetime.time():  # a datetime is a date
            return value.isoformat()
        case _:
            return text_of(str(value))


def storable_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row, each as `storable` returns it."""
    return {text_of(str(name)): storable(value) for name, value in fields.items()}


def text_of(text: str) -> str:
    """A text as UTF-8 can hold it: lone surrogates are written as escapes."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _with_head(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The beginning of a file, and all its chunks, those of the beginning too.

    Where the beginning is damaged, the chunks before that come first, and then the error.
    """
    head: list[bytes] = []
    size = 0
    try:
        for chunk in chunks:
            head.append(chunk)
            size += len(chunk)
            if size >= HEAD_BYTES:
                break
    except READ_ERRORS as error:
        if not head:
            raise
        chunks = _raising(error)
    return b"".join(head)[:HEAD_BYTES], chain(head, chunks)


def _raising(error: Exception) -> Iterator[bytes]:
    yield from ()
    raise error


def _document(chunks: Iterator[bytes], options: ReadOptions, source: str) -> Any:
    data = b"".join(chunks).removeprefix(codecs.BOM_UTF8)
    try:
        return decode_json(data)
    except orjson.JSONDecodeError as error:
        raise options.error(f"{source}:{error.lineno}", f"is not valid JSON: {error}") from error


def _array_batches(chunks: Iterator[bytes], options: ReadOptions, source: str) -> Iterator[list[TableRow]]:
    """The elements of an array as rows, numbered from 1."""
    batch: list[TableRow] = []
    for number, value in enumerate(_Array(chunks, options, source).elements(), 1):
        if isinstance(value, dict):
            batch.append(TableRow(number, value))
        else:
            batch.append(TableRow(number, {}, TypeError(f"not a JSON object but {type(value).__name__}")))
        if len(batch) >= options.batch_rows:
            yield batch
            batch = []
    if batch:
        yield batch


class _Array:
    """A JSON array that is decoded element by element; holds about one element and one chunk."""

    def __init__(self, chunks: Iterator[bytes], options: ReadOptions, source: str) -> None:
        self._chunks = chunks
        self._options = options
        self._source = source
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text = ""
        self._at = 0
        self._number = 0
        self._ended = False

    def elements(self) -> Iterator[Any]:
        """The elements in order.

        Raises:
            ConfigError: The array is damaged, cut short or followed by something else.
        """
        self._expect("[")
        if self._next() == "]":
            self._at += 1
        else:
            while True:
                self._number += 1
                yield self._element()
                if self._expect(",]") == "]":
                    break
                self._next()
        if rest := self._next():
            raise self._error(f"has {rest!r} behind its end")

    def _element(self) -> Any:
        """Decode the next element; the text is extended until it holds all of it, and a character more."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise self._error("is nested too deeply") from error
            except json.JSONDecodeError as error:
                if self._fits_another_chunk() and self._read():
                    continue
                raise self._error(f"is not valid JSON: {error.msg}") from error
            if end == len(self._text) and self._read():  # a number may go on
                continue
            self._at = end
            return value

    def _fits_another_chunk(self) -> bool:
        if len(self._text) - self._at > self._options.max_line_bytes:
            raise self._error(f"is longer than {self._options.max_line_bytes} bytes, or not valid JSON")
        return True

    def _next(self) -> str:
        """The next character that is not white space, which is not taken; "" at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found is not None else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def _expect(self, wanted: str) -> str:
        found = self._next()
        if not found or found not in wanted:
            where = f"has {found!r}" if found else "ends"
            raise self._error(f"is not a valid JSON array: it {where} where {' or '.join(wanted)} belongs")
        self._at += 1
        return found

    def _read(self) -> bool:
        """Add a chunk, or as much as an unfinished element has so far, so that no text is decoded often."""
        wanted, parts = len(self._text) - self._at, [self._text[self._at :]]
        self._at = 0
        added = 0
        while not self._ended and added <= wanted:
            chunk = next(self._chunks, None)
            self._ended = chunk is None
            try:
                parts.append(self._decode(chunk or b"", chunk is None))
            except UnicodeDecodeError as error:
                raise self._error(f"is not valid UTF-8: {error.reason}") from error
            added += len(parts[-1])
        self._text = "".join(parts)
        return added > 0

    def _error(self, problem: str) -> Exception:
        place = f"{self._source}:{self._number}" if self._number else self._source
        return self._options.error(place, problem)
