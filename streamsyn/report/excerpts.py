"""Excerpts of texts for reading: long ones are cut in the middle, and the words of the answer are marked."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from streamsyn.report.log_rows import Span

Kind = Literal["plain", "answer", "cut"]

_LONG = 3600
"""Longer texts are cut, in characters."""
_HEAD, _TAIL, _AFTER, _BEFORE = 900, 500, 900, 200
"""Characters kept of a long text: at its start and end, and after and before facts and the answer."""
_MAX_WORD = 40
_MIN_CUT = 300
"""Shorter parts are not cut out."""
_MAX_MARKS = 400
_MAX_WORDS = 24
"""Of answers with more words only names and numbers are marked, as the rest is common."""
_COMMON = frozenset(
    re.findall(
        r"\w+",
        """about after also been being both does from have into more most only other over same some such than
        that their them then there these they this those through were what when where which while will with
        would your""",
    )
)
_SUBSTITUTES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_SUBSTITUTES |= dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000)), 0xFFFD)
_SUBSTITUTES |= dict.fromkeys((0x2028, 0x2029), 0x2424)
_SUBSTITUTES |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F), 0x2423)


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a text of one kind; `in_facts` if its section was asked to hold the facts."""

    text: str
    kind: Kind = "plain"
    in_facts: bool = False


def visible(text: str) -> str:
    """Return the text with visible substitutes for control and bidirectional characters."""
    return text.translate(_SUBSTITUTES)


def shortened(text: str, max_chars: int, *, show_rest: bool = True) -> str:
    """Return at most `max_chars` characters, and how many are left out if `show_rest` is set."""
    if len(text) <= max_chars:
        return visible(text)
    missing = f" ({len(text) - max_chars:,} characters left out)" if show_rest else ""
    return f"{visible(text[:max_chars])} \u2026{missing}"


def excerpt(
    text: str, answer: str = "", facts: Sequence[Span] = (), long_chars: int = _LONG
) -> list[Segment]:
    """Return the segments of a text, cut in the middle if it is long.

    Args:
        text: Any text.
        answer: The answer, whose words are marked.
        facts: Spans of the sections that were asked to hold the facts.
        long_chars: Length in characters above which a text is cut.
    """
    marks = answer_spans(text, answer)
    kept = [(0, len(text))]
    if len(text) > long_chars:
        share = long_chars / _LONG
        head, tail, after = (int(share * chars) for chars in (_HEAD, _TAIL, _AFTER))
        shown = [(0, head), (len(text) - tail, len(text))]
        shown += [(start - _BEFORE, start + after) for start, _ in (*facts[:2], *marks[:1])]
        kept = _joined(_at_words(text, max(0, start), min(end, len(text))) for start, end in shown)
    segments: list[Segment] = []
    last_end = 0
    for start, end in kept:
        if start > last_end:
            segments.append(Segment(f"{start - last_end:,} characters left out", "cut"))
        segments += _marked(text, start, end, marks, facts)
        last_end = end
    return segments


def answer_spans(text: str, answer: str) -> list[Span]:
    """Return the spans of the answer in a text; if there are none, those of its distinctive words."""
    words = answer.split()
    if words and len(answer) <= 300:
        whole = _spans(text, r"\s+".join(map(re.escape, words)))
        if whole:
            return whole
    distinctive = _distinctive_words(answer)
    return _spans(text, "|".join(map(re.escape, distinctive))) if distinctive else []


def _distinctive_words(answer: str) -> list[str]:
    found = dict.fromkeys(
        word for word in re.findall(r"\w+", answer) if len(word) > 3 or any(map(str.isdigit, word))
    )
    words = [word for word in found if word.casefold() not in _COMMON]
    if len(words) > _MAX_WORDS:
        words = [word for word in words if word[0].isupper() or word[0].isdigit()]
    return words[:_MAX_WORDS]


def _spans(text: str, pattern: str) -> list[Span]:
    found = re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", text, re.IGNORECASE)
    return [match.span() for _, match in zip(range(_MAX_MARKS), found, strict=False)]


def _at_words(text: str, start: int, end: int) -> Span:
    """Return nearly the same span, moved so that no word is cut."""
    if start > 0:
        start = max(start, text.find(" ", start, start + _MAX_WORD) + 1)
    if end < len(text):
        end = max(text.rfind(" ", end - _MAX_WORD, end), end - _MAX_WORD)
    return start, max(start, end)


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Return the spans in order, with those joined that overlap or nearly touch."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start - joined[-1][1] < _MIN_CUT:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _marked(
    text: str, start: int, end: int, marks: Sequence[Span], facts: Sequence[Span]
) -> Iterator[Segment]:
    """Yield the segments from `start` to `end`."""
    edges = {start, end, *(edge for span in (*marks, *facts) for edge in span if start < edge < end)}
    for low, high in pairwise(sorted(edges)):
        kind: Kind = "answer" if any(left <= low < right for left, right in marks) else "plain"
        yield Segment(visible(text[low:high]), kind, any(left <= low < right for left, right in facts))
