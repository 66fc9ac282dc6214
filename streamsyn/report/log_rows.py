"""Fields of a log row, which another version or a user's recipe may have written."""

from math import isfinite
from typing import Any, TypeGuard


def text(row: Any, key: str) -> str:
    """A text; "" where there is none."""
    value = row.get(key) if isinstance(row, dict) else None
    return value if isinstance(value, str) else ""


def number(row: Any, key: str) -> float:
    """A number; 0 where there is none."""
    value = row.get(key) if isinstance(row, dict) else None
    return value if is_number(value) else 0.0


def numbers(row: Any, key: str) -> list[int]:
    """A list of whole numbers; empty where there is none."""
    value = row.get(key) if isinstance(row, dict) else None
    return [one for one in value if isinstance(one, int)] if isinstance(value, list) else []


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def checks_of(row: dict[str, Any]) -> dict[str, Any]:
    """The checks of a context."""
    checks = row.get("checks")
    return checks if isinstance(checks, dict) else {}


def words_of(row: dict[str, Any]) -> int:
    """Words of a context, as its checks have them or counted."""
    words = checks_of(row).get("words")
    return int(words) if is_number(words) else len(text(row, "context").split())
