"""Fields of a log row. Another version or a user's recipe may have written it, so fields may be missing."""

from math import isfinite
from typing import Any, TypeGuard

from streamsyn.words import word_count

Span = tuple[int, int]
"""Start and end of a part of a text, in characters."""

ANSWER_METRICS = {"f1": "F1", "rouge_l": "ROUGE-L"}
"""Names of the answer scores for display, by `checks.answer_metric`."""
_SNAP_CHARS = 400
"""Maximum distance by which a section's estimated start is moved to the start of a paragraph."""


def text(row: Any, key: str) -> str:
    """Return a text; "" if there is none."""
    value = row.get(key) if isinstance(row, dict) else None
    return value if isinstance(value, str) else ""


def number(row: Any, key: str) -> float:
    """Return a number; 0 if there is none."""
    value = row.get(key) if isinstance(row, dict) else None
    return value if is_number(value) else 0.0


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def checks_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return the checks of a context."""
    checks = row.get("checks")
    return checks if isinstance(checks, dict) else {}


def words_of(row: dict[str, Any]) -> int:
    """Return the number of words of a context, from its checks or counted."""
    words = checks_of(row).get("words")
    return int(words) if is_number(words) else word_count(text(row, "context"))


def facts_spans(row: dict[str, Any]) -> list[Span]:
    """Return where the sections that were asked to hold the facts are in a context of the recipe `sections`.

    The spans are estimates: the log has the tokens of each section, not its characters. Each span starts at a
    paragraph if one starts nearby.
    """
    checks, context = checks_of(row), text(row, "context")
    fact_sections, sections = checks.get("fact_sections"), int(number(checks, "sections"))
    if not isinstance(fact_sections, list) or not fact_sections or sections < 1 or not context:
        return []
    tokens = [
        number(step, "completion_tokens") - number(step, "thinking_tokens")
        for step in (row.get("steps") or [])[1:]
    ]
    if len(tokens) != sections or not sum(tokens):  # some steps wrote summaries: assume equal sections
        tokens = [1.0] * sections
    edges = [len(context) * sum(tokens[:index]) / sum(tokens) for index in range(sections + 1)]
    starts = [_paragraph_start(context, round(edge)) for edge in edges]
    return [
        (starts[index], starts[index + 1])
        for index in fact_sections
        if isinstance(index, int) and 0 <= index < sections
    ]


def _paragraph_start(context: str, at: int) -> int:
    """Return the nearest start of a paragraph; `at` itself if none is near."""
    if at <= 0 or at >= len(context):
        return max(0, min(at, len(context)))
    before, after = context.rfind("\n\n", 0, at + 2), context.find("\n\n", at)
    near = [found + 2 for found in (before, after) if found >= 0 and abs(found + 2 - at) <= _SNAP_CHARS]
    return min(near, key=lambda found: abs(found - at), default=at)
