"""Texts to read: cut in the middle when they are long, with what matters in them marked.

What is shown of single rejects, near-duplicates and leaks.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from streamsyn.report.log_rows import text

Span = tuple[int, int]
Kind = Literal["plain", "answer", "cut"]

_LONG = 3600
"""Characters; longer texts are cut."""
_HEAD, _TAIL, _ROUND, _BEFORE = 900, 500, 900, 200
"""Characters that are left of a long text: at its start, its end, and from a little before what matters."""
_WORD = 40
_NEAR = 300
"""Nothing shorter is cut out."""
_MOST_MARKS = 400
_MOST_WORDS = 24
"""Of a longer answer only names and numbers are looked for: the rest stands everywhere."""
_COMMON = frozenset(
    re.findall(
        r"\w+",
        """about after also been being both does from have into more most only other over same some such than
        that their them then there these they this those through were what when where which while will with
        would your""",
    )
)
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000)), 0xFFFD)
_PICTURES |= dict.fromkeys((0x2028, 0x2029), 0x2424)
_PICTURES |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F), 0x2423)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text of one kind; `in_facts` where the facts were asked for there."""

    text: str
    kind: Kind = "plain"
    in_facts: bool = False


def visible(text: str) -> str:
    """With signs for control characters, and for those that turn the direction of writing."""
    return text.translate(_PICTURES)


def shortened(text: str, most_chars: int, *, is_told: bool = True) -> str:
    """As it is, or its beginning and, if that is to be told, how much is missing."""
    if len(text) <= most_chars:
        return visible(text)
    missing = f" ({len(text) - most_chars:,} characters left out)" if is_told else ""
    return f"{visible(text[:most_chars])} \u2026{missing}"


def excerpt(text: str, answer: str = "", facts: Sequence[Span] = (), long_chars: int = _LONG) -> list[Piece]:
    """The text in pieces, cut in the middle where it is long.

    Args:
        text: Any text.
        answer: Its words are marked.
        facts: Where the facts were asked for.
        long_chars: Nothing is cut from a text of so many characters.
    """
    marks = answer_spans(text, answer)
    kept = [(0, len(text))]
    if len(text) > long_chars:
        share = long_chars / _LONG
        head, tail, extent = (int(share * chars) for chars in (_HEAD, _TAIL, _ROUND))
        shown = [(0, head), (len(text) - tail, len(text))]
        shown += [(start - _BEFORE, start + extent) for start, _ in (*facts[:2], *marks[:1])]
        kept = _joined(_at_words(text, max(0, start), min(end, len(text))) for start, end in shown)
    pieces: list[Piece] = []
    before = 0
    for start, end in kept:
        if start > before:
            pieces.append(Piece(f"{start - before:,} characters left out", "cut"))
        pieces += _marked(text, start, end, marks, facts)
        before = end
    return pieces


def answer_spans(text: str, answer: str) -> list[Span]:
    """Where the answer stands in a text; where it does not as a whole, its telling words."""
    words = answer.split()
    if words and len(answer) <= 300:
        whole = _spans(text, r"\s+".join(map(re.escape, words)))
        if whole:
            return whole
    telling = _telling(answer)
    return _spans(text, "|".join(map(re.escape, telling))) if telling else []


def _telling(answer: str) -> list[str]:
    found = dict.fromkeys(
        word for word in re.findall(r"\w+", answer) if len(word) > 3 or any(map(str.isdigit, word))
    )
    words = [word for word in found if word.casefold() not in _COMMON]
    if len(words) > _MOST_WORDS:
        words = [word for word in words if word[0].isupper() or word[0].isdigit()]
    return words[:_MOST_WORDS]


def _spans(text: str, pattern: str) -> list[Span]:
    found = re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", text, re.IGNORECASE)
    return [match.span() for _, match in zip(range(_MOST_MARKS), found, strict=False)]


def _at_words(text: str, start: int, end: int) -> Span:
    """Nearly the same span, so that no word is cut at its ends."""
    if start > 0:
        start = max(start, text.find(" ", start, start + _WORD) + 1)
    if end < len(text):
        end = max(text.rfind(" ", end - _WORD, end), end - _WORD)
    return start, max(start, end)


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Spans in order, those that overlap or nearly touch made one."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start - joined[-1][1] < _NEAR:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _marked(text: str, start: int, end: int, marks: Sequence[Span], facts: Sequence[Span]) -> Iterator[Piece]:
    """The pieces from `start` to `end`."""
    edges = {start, end, *(edge for span in (*marks, *facts) for edge in span if start < edge < end)}
    for low, high in pairwise(sorted(edges)):
        kind: Kind = "answer" if any(left <= low < right for left, right in marks) else "plain"
        yield Piece(visible(text[low:high]), kind, any(left <= low < right for left, right in facts))


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
