"""The other fields of a row as JSON values that the log can hold: exactly, or as text."""

import datetime
import math
from collections.abc import Mapping
from typing import Any, Final

_MAX_DEPTH: Final = 200
"""Levels of nesting that are kept: JSON's nesting is limited, and the log puts levels of its own around."""
_LEAST, _MOST = -(2**63), 2**64 - 1
"""Integers that can be written as numbers."""


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


_NOT_FINITE: Final = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
"""As JSON files that Python has written spell them."""
