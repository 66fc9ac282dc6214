"""What is shown of single rejects, near-duplicates and leaks."""

from dataclasses import dataclass
from typing import Any

from streamsyn.report.excerpts import shortened
from streamsyn.report.rows import text

_SHORT, _PAIR = 400, 180


@dataclass(frozen=True, slots=True)
class RejectExample:
    """One reject, cut to what a person reads."""

    where: str
    instruction: str
    answer: str
    detail: str
    tries: int
    errors: str

    @classmethod
    def of(cls, row: dict[str, Any], where: str) -> "RejectExample":
        """From a row of rejects."""
        attempts = row.get("attempts") or []
        errors = [text(attempt, "error") for attempt in attempts if text(attempt, "error")]
        return cls(
            where=shortened(where, 200),
            instruction=shortened(text(row, "instruction"), _SHORT),
            answer=shortened(text(row, "answer"), _SHORT),
            detail=shortened(text(row, "detail"), _SHORT),
            tries=len(attempts),
            errors=shortened("; ".join(errors), _SHORT),
        )


@dataclass(frozen=True, slots=True)
class Match:
    """A context and what it repeats."""

    id: str
    other: str
    """Its id or file as the log has it; `other_id` is for reading."""
    other_id: str
    figure: str
    words: str

    @classmethod
    def of(cls, name: str, other: str, figure: str, words: str) -> "Match":
        """With names and words cut to what a person reads."""
        return cls(shortened(name, 120), other, shortened(other, 200), figure, shortened(words, _SHORT))


def opening(row: dict[str, Any]) -> str:
    """How a context begins."""
    return shortened(" ".join(text(row, "context")[: 2 * _SHORT].split()), _PAIR, is_told=False)
