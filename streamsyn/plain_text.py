"""Text that servers, seeds and plug-ins wrote, made safe for a terminal and short enough for a message."""

import re
import reprlib
from typing import Any, Final

MAX_MESSAGE_BYTES: Final = 2048
"""Longest message that is kept in the log or shown."""

# Control characters except line ends and tabs; line separators; characters that turn the direction of
# writing; surrogates, which cannot be encoded.
_UNSAFE: Final = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)"
)
_BREAKS: Final = re.compile(r"[\r\n\t]\s*")

_REPR: Final = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


def visible(text: str) -> str:
    r"""Return `text` with characters that could control a terminal as escapes, such as `\x1b`."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def cut(text: str, max_bytes: int = MAX_MESSAGE_BYTES) -> str:
    """Return the beginning of `text`: at most `max_bytes` bytes of UTF-8, a note of what was cut included."""
    if len(text) * 4 <= max_bytes:
        return text
    size = len(text.encode(errors="replace"))
    if size <= max_bytes:
        return text
    note = f"... (cut: {size:,} bytes)"
    return text[:max_bytes].encode(errors="replace")[: max_bytes - len(note)].decode(errors="ignore") + note


def message(text: str) -> str:
    """Return `text` as a message: one visible line of at most 2 KB."""
    return cut(_BREAKS.sub(" ", visible(cut(text).strip())))


def short_repr(value: Any) -> str:
    """Return a short `repr` of any JSON value, however large or deep it is."""
    return _REPR.repr(value)
