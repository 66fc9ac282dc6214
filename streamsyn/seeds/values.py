"""The values in the fields of a row: texts, answers, and all others as the log can hold them."""

import datetime
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, Final

_MAX_DEPTH: Final = 200
"""Levels of nesting that are kept: JSON's nesting is limited, and the log puts levels of its own around."""
_LEAST, _MOST = -(2**63), 2**64 - 1
"""Integers that can be written as numbers."""
_NOT_FINITE: Final = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
"""As JSON files that Python has written spell them."""


class NotASeed(Exception):
    """Raised when a row is not a valid seed; its text says why."""


def is_absent(row: Mapping[str, Any], name: str) -> bool:
    """Whether a field is missing or holds nothing: null, an empty text or list."""
    value = row.get(name)
    return value is None or (isinstance(value, str | list | dict) and not value)


def text_in(row: Mapping[str, Any], name: str) -> str:
    """The text of a field, or of its text parts.

    Raises:
        NotASeed: It holds something else, or white space alone.
    """
    value = row[name]
    if isinstance(value, list) and all(isinstance(part, dict) and "type" in part for part in value):
        value = "\n\n".join(_part(part, name) for part in value)
    if not isinstance(value, str):
        raise NotASeed(f"field {name!r} is not a string but {type(value).__name__}")
    if not value.strip():
        raise NotASeed(f"field {name!r} is empty")
    return value


def answers_in(value: Any, name: str) -> list[str]:
    """The answers in a field: a text, a number, a list of these, or an object as in SQuAD and TriviaQA.

    Raises:
        NotASeed: There is none.
    """
    if isinstance(value, str) and value.strip():
        return [value]
    found = list(dict.fromkeys(text for text in _answers(value, name) if text.strip()))
    if not found:
        raise NotASeed(f"field {name!r} is empty")
    return found


def _answers(value: Any, name: str) -> Iterator[str]:
    match value:
        case str():
            yield value
        case bool():
            yield "true" if value else "false"
        case int() | float() | Decimal():
            yield str(value)
        case list() if value and all(isinstance(part, dict) and "type" in part for part in value):
            yield "\n\n".join(_part(part, name) for part in value)
        case list():
            for one in value:
                if one is not None:
                    yield from _answers(one, name)
        case {"text": found}:  # SQuAD
            yield from _answers(found, name)
        case {"value": found, **rest}:  # TriviaQA
            yield from _answers([found, rest.get("aliases") or []], name)
        case _:
            raise NotASeed(
                f"field {name!r} holds no text, number or list of these but {type(value).__name__}"
            )


def _part(part: Mapping[str, Any], name: str) -> str:
    text = part.get("text")
    if part["type"] not in {"text", "input_text", "output_text"} or not isinstance(text, str):
        raise NotASeed(f"field {name!r} has a part that is not text but {part['type']!r}")
    return text


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
