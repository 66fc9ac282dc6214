"""Examples in the report: rejects, repeats, and samples to read.

They are drawn by keys that depend on ids only, so the same run gives the same examples whatever the log's
order. Each keeps only what is shown: long texts are cut in the middle, and the answer's words are marked.
"""

import re
from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from typing import Any, Generic, Literal, TypeVar

from streamsyn.records import digest
from streamsyn.report.log_rows import ANSWER_METRICS, Span, checks_of, facts_spans, number, text, words_of

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


T = TypeVar("T")

_MAX_SAMPLES = 10
"""Samples to read."""
_ENDS = 160
"""Characters at both ends by which a context is found in a prompt."""
_INSTRUCTION, _ANSWER, _LINE = 1200, 1500, 140
"""Characters shown of an instruction, of an answer, and of an instruction in one line."""
_OTHERS = 2400
"""Characters shown of the prompt before and after the relevant passage."""
_DETAIL, _OPENING = 400, 180
"""Characters shown of the texts of a reject, and of the beginning of a context."""


class BottomK(Generic[T]):
    """A bottom-k sample: keeps the `size` items with the smallest keys. An item is made only if it is kept.

    With `draw_key` this is a uniform sample without replacement that does not depend on the order.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: list[tuple[tuple[float, bytes], T]] = []

    def offer(self, key: tuple[float, bytes], make: Callable[[], T]) -> None:
        """Keep the item that `make` returns, if its key is among the smallest."""
        if len(self._kept) == self._size and key >= self._kept[-1][0]:
            return
        insort(self._kept, (key, make()), key=lambda kept: kept[0])
        del self._kept[self._size :]

    @property
    def items(self) -> list[T]:
        """The items, smallest key first."""
        return [item for _, item in self._kept]


def draw_key(purpose: str, name: str, rank: float = 0.0) -> tuple[float, bytes]:
    """Return a uniformly distributed key of a name; a smaller `rank` comes first."""
    return rank, digest("report", purpose, name)


@dataclass(frozen=True, slots=True)
class RejectExample:
    """A reject."""

    where: str
    instruction: str
    answer: str
    detail: str
    attempts: int
    errors: str

    @classmethod
    def of(cls, row: dict[str, Any], where: str) -> "RejectExample":
        """Make an example from a row of rejects."""
        attempts = row.get("attempts") or []
        errors = [text(attempt, "error") for attempt in attempts if text(attempt, "error")]
        return cls(
            where=shortened(where, 200),
            instruction=shortened(text(row, "instruction"), _DETAIL),
            answer=shortened(text(row, "answer"), _DETAIL),
            detail=shortened(text(row, "detail"), _DETAIL),
            attempts=len(attempts),
            errors=shortened("; ".join(errors), _DETAIL),
        )


@dataclass(frozen=True, slots=True)
class RepeatExample:
    """A context and what it repeats: an earlier context, or evaluation data."""

    id: str
    other: str
    """The id or file as in the log; `other_id` is the same for display."""
    other_id: str
    degree: str
    """Similarity, or number of shared n-grams."""
    words: str

    @classmethod
    def of(cls, name: str, other: str, degree: str, words: str) -> "RepeatExample":
        """Make an example with shortened texts."""
        return cls(shortened(name, 120), other, shortened(other, 200), degree, shortened(words, _DETAIL))


def opening(row: dict[str, Any]) -> str:
    """Return the beginning of a context."""
    return shortened(" ".join(text(row, "context")[: 2 * _DETAIL].split()), _OPENING, show_rest=False)


@dataclass(slots=True)
class SampleExample:
    """A sample to read; without a prompt if there is only its context."""

    key: str
    """The id as in the log; `id` is the same for display."""
    id: str
    task: str
    instruction: str
    answer: str
    passage: list[Segment]
    words: int
    has_facts: bool
    scores: list[tuple[str, str]]
    flags: list[str]
    model_answers: list[tuple[str, str]]
    """The model's answers with and without the context."""
    opening: str
    """The instruction in one line."""
    ends: tuple[int, str, str]
    """The length of the context, and its first and last characters."""
    instruction_start: str = ""
    before: list[Segment] = field(default_factory=list)
    after: list[Segment] = field(default_factory=list)
    question: list[Segment] = field(default_factory=list)
    passages: int = 0
    position: int = 0
    """Number of passages in the prompt, and number of the relevant one (1-based); 0 without a prompt."""
    n_tokens: int = 0
    is_in_prompt: bool = True
    """Whether the prompt contains the context unchanged."""

    @classmethod
    def of_context(cls, row: dict[str, Any]) -> "SampleExample":
        """Make an example from a row of contexts."""
        context, checks = text(row, "context"), checks_of(row)
        facts = facts_spans(row)
        return cls(
            key=text(row, "id"),
            id=shortened(text(row, "id"), 120),
            task=shortened(text(row, "task"), 80),
            instruction=shortened(text(row, "instruction"), _INSTRUCTION),
            answer=shortened(text(row, "answer"), _ANSWER),
            passage=excerpt(context, text(row, "answer"), facts),
            words=words_of(row),
            has_facts=bool(facts),
            scores=_scores(checks),
            flags=[shortened(str(flag), 60) for flag in checks.get("flags") or ()],
            model_answers=[
                (how, shortened(text(checks, key), _ANSWER))
                for how, key in (("with the context", "model_answer"), ("without it", "closed_book_answer"))
                if isinstance(checks.get(key), str)
            ],
            opening=shortened(" ".join(text(row, "instruction").split()), _LINE, show_rest=False),
            ends=(len(context), context[:_ENDS], context[-_ENDS:]),
            instruction_start=text(row, "instruction")[:_ENDS],
        )

    def add_prompt(self, row: dict[str, Any]) -> None:
        """Add the prompt of a row of samples."""
        messages = row.get("messages") or [{}]
        prompt = "\n\n".join(text(message, "content") for message in messages[:-1])
        self.passages, self.n_tokens = len(row.get("context_seqs") or ()), int(number(row, "n_tokens"))
        self.position = int(number(row, "relevant_index")) + 1
        start, end = self._find(prompt)
        self.is_in_prompt = end > start
        asked = prompt.rfind(self.instruction_start, end) if self.instruction_start else -1
        asked = max(end, prompt.rfind("\n\n", end, asked)) if asked >= 0 else len(prompt)
        self.before = excerpt(prompt[:start].strip(), long_chars=_OTHERS)
        self.after = excerpt(prompt[end:asked].strip(), long_chars=_OTHERS)
        self.question = excerpt(prompt[asked:].strip(), long_chars=_OTHERS)

    def _find(self, prompt: str) -> Span:
        length, first, last = self.ends
        start = prompt.find(first) if first else -1
        while start >= 0:
            if prompt.startswith(last, start + length - len(last)):
                return start, start + length
            start = prompt.find(first, start + 1)
        return 0, 0


class SampleExamples:
    """Draws contexts of each task to read, and finds their prompts."""

    def __init__(self) -> None:
        self._by_task: dict[str, BottomK[SampleExample]] = {}
        self._by_id: dict[str, list[SampleExample]] | None = None
        self.lowest_gain: BottomK[SampleExample] = BottomK(3)
        self.unanswered: BottomK[SampleExample] = BottomK(3)

    def add_context(self, task: str, row: dict[str, Any]) -> None:
        """Consider a row of contexts."""
        name, checks = text(row, "id"), checks_of(row)
        examples = self._by_task.setdefault(task, BottomK(_MAX_SAMPLES))
        examples.offer(draw_key("reading", name), lambda: SampleExample.of_context(row))
        flags = checks.get("flags") or ()
        if "low_context_gain" in flags:
            key = draw_key("gain", name, number(checks, "context_gain"))
            self.lowest_gain.offer(key, lambda: SampleExample.of_context(row))
        if "not_answerable" in flags:
            key = draw_key("answer", name, number(checks, "answer_score"))
            self.unanswered.offer(key, lambda: SampleExample.of_context(row))

    def add_prompt(self, row: dict[str, Any]) -> None:
        """Add the prompt of a row of samples if its context was drawn; call it after all contexts."""
        if self._by_id is None:
            chosen = [*self._by_task.values(), self.lowest_gain, self.unanswered]
            self._by_id = {}
            for example in (one for some in chosen for one in some.items):
                self._by_id.setdefault(example.key, []).append(example)
        for example in self._by_id.get(text(row, "id"), ()):
            example.add_prompt(row)

    def spread(self) -> list[SampleExample]:
        """Return the samples to read, spread over the tasks; those with a prompt first."""
        by_task = [
            sorted(self._by_task[task].items, key=lambda example: not example.passages)
            for task in sorted(self._by_task)
        ]
        in_turn = (one for turn in zip_longest(*by_task) for one in turn if one is not None)
        return [example for _, example in zip(range(_MAX_SAMPLES), in_turn, strict=False)]


def _scores(checks: dict[str, Any]) -> list[tuple[str, str]]:
    scores = []
    if isinstance(checks.get("context_gain"), int | float):
        scores.append(("context gain", f"{checks['context_gain']:+.2f} nats per token"))
    metric = ANSWER_METRICS.get(text(checks, "answer_metric"), "answer score")
    if isinstance(checks.get("answer_score"), int | float):
        scores.append((metric, f"{checks['answer_score']:.2f}"))
    if isinstance(checks.get("closed_book_score"), int | float):
        scores.append(("closed-book", f"{checks['closed_book_score']:.2f}"))
    return scores
