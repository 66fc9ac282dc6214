"""What the beginning of a file says about all of it: its layout, or why it cannot be read."""

import json
from enum import Enum
from itertools import pairwise
from typing import Final

import orjson

from streamsyn.io.rows import BOM

HEAD_BYTES: Final = 64 * 1024
"""Bytes of a file that are looked at."""
_LATIN1_ADVICE: Final = "convert it: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
_FIRST_BYTES: Final = (
    (
        b"version https://git-lfs.github.com/spec/",
        "is a Git LFS pointer, not the data: run `git lfs pull`, or download the file itself",
    ),
    (b"\xff\xfe\x00\x00", "is UTF-32, not UTF-8; convert it: iconv -f UTF-32 -t UTF-8 FILE > NEW"),
    (b"\xff\xfe", "is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    (b"\xfe\xff", "is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    (b"PK\x03\x04", "is a zip archive; unpack it first"),
    (b"PAR1", "is Parquet; give it the ending .parquet"),
)


class Layout(Enum):
    """How the rows of a JSON file are laid out."""

    LINES = "one value a line"
    ARRAY = "one array"
    DOCUMENT = "one object over several lines"


def problem_of(head: bytes, *, of_rows: bool = True) -> str | None:
    """Why a file cannot be one of text in UTF-8, with what to do; None if it may be one.

    Args:
        head: Up to `HEAD_BYTES` from its beginning, decompressed.
        of_rows: Whether it should have rows: then it is not a web page.
    """
    problem = next((problem for first, problem in _FIRST_BYTES if head.startswith(first)), None)
    if problem is not None:
        return problem
    if of_rows and head[:64].removeprefix(BOM).lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, not the data: download the file itself"
    if 4 * head[:400].count(b"\0") > len(head[:400]):
        return "is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"
    return f"is Latin-1 (or Windows-1252), not UTF-8; {_LATIN1_ADVICE}" if _is_latin1(head) else None


def encoding_hint(text: bytes) -> str:
    """What a line that is not UTF-8 probably is, with what to do; "" if that is not clear."""
    return f"; it looks like Latin-1: {_LATIN1_ADVICE}" if _is_latin1_line(text) else ""


def layout_of(head: bytes) -> Layout:
    """The layout of a JSON file.

    Args:
        head: Up to `HEAD_BYTES` from its beginning, decompressed.
    """
    text = head.removeprefix(BOM).lstrip()
    first, newline, rest = text.partition(b"\n")
    if not text.startswith((b"[", b"{")) or (_is_json(first) and rest.strip()):
        return Layout.LINES
    if text.startswith(b"["):
        return Layout.ARRAY
    is_cut = len(head) >= HEAD_BYTES
    return Layout.DOCUMENT if newline and _goes_on(text, len(first), is_cut=is_cut) else Layout.LINES


def _goes_on(text: bytes, first: int, *, is_cut: bool) -> bool:
    """Whether the JSON object at the beginning of a text goes on behind its first line, of `first` bytes."""
    shown = text.decode(errors="replace")
    try:
        _, end = json.JSONDecoder(strict=False).raw_decode(shown)
    except RecursionError:
        return False
    except json.JSONDecodeError as error:
        # A text that was cut fails at its end, or at the string that has no end.
        is_open = error.pos >= len(shown) - 8 or error.msg.startswith("Unterminated")
        return is_cut and is_open and error.pos > first
    return end > first


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _is_latin1(head: bytes) -> bool:
    """Whether lines are valid in Latin-1 alone: some are, and no line has other characters in UTF-8."""
    if head.isascii():
        return False
    *lines, last = head.split(b"\n")
    if len(head) < HEAD_BYTES:
        lines.append(last)  # otherwise it was cut, perhaps within a character
    lines = [line for line in lines if line.strip()]
    other = [line for line in lines if not line.isascii()]
    wrong = [line for line in other if not is_utf8(line)]
    return (
        bool(wrong)
        and len(wrong) == len(other)
        and all(map(_is_latin1_line, wrong))
        and (
            len(wrong) > 1 or len(lines) <= 2  # a lone line among others is for its own reject
        )
    )


def _is_latin1_line(line: bytes) -> bool:
    """Whether a line that is not UTF-8 makes sense in Latin-1: printable, with letters beyond ASCII."""
    text = line.decode("cp1252", "replace")
    other = [character for character in text if character > "\x7f"]
    letters = sum(character.isalpha() for character in other)
    return (
        "\ufffd" not in text
        and bool(letters)
        and any(before.isascii() and before.isalpha() and after > "\x7f" for before, after in pairwise(text))
    )


def is_utf8(line: bytes) -> bool:
    """Whether some bytes are valid UTF-8."""
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
