"""Samples drawn evenly from a stream of unknown length: those whose keys are smallest.

Samples to read: drawn evenly for each task, cut to what a person reads.
"""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Generic, TypeVar

from streamsyn.records import digest
from streamsyn.report.excerpts import Piece, Span, excerpt, shortened
from streamsyn.report.log_rows import checks_of, number, numbers, text, words_of

T = TypeVar("T")


class BottomK(Generic[T]):
    """Keeps the few items with the smallest keys; an item is made only when it is to be kept.

    With `drawn` as the key that is an even draw without replacement, the same whatever the order.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._kept: list[tuple[tuple[float, bytes], T]] = []

    def offer(self, key: tuple[float, bytes], make: Callable[[], T]) -> None:
        """Keep what `make` makes, if its key is among the smallest."""
        if len(self._kept) == self._number and key >= self._kept[-1][0]:
            return
        insort(self._kept, (key, make()), key=lambda kept: kept[0])
        del self._kept[self._number :]

    @property
    def items(self) -> list[T]:
        """What is kept, smallest key first."""
        return [item for _, item in self._kept]


def drawn(what: str, name: str, rank: float = 0.0) -> tuple[float, bytes]:
    """A key that falls evenly: what is drawn for depends on names alone. A `rank` goes first."""
    return rank, digest("report", what, name)


NUMBER = 10
"""Samples to read."""
_ENDS = 160
"""Characters at both ends by which a context is found in a prompt."""
_SHORT, _ANSWER, _LINE = 1200, 1500, 140
_OTHERS = 2400
"""Characters that are shown of what stands round the relevant passage."""
_SNAP = 400
"""A section begins at a paragraph: so far from where its tokens say, at most."""


@dataclass(slots=True)
class ReaderSample:
    """One sample as it is shown; without a prompt where there is only its context."""

    key: str
    """The id as the log has it; `id` is for reading."""
    id: str
    task: str
    instruction: str
    answer: str
    passage: list[Piece]
    words: int
    has_facts: bool
    figures: list[tuple[str, str]]
    flags: list[str]
    said: list[tuple[str, str]]
    """What the model answered, with and without the context."""
    opening: str
    """The instruction in a line."""
    ends: tuple[int, str, str]
    """Length of the context, its first and its last characters."""
    instruction_start: str = ""
    before: list[Piece] = field(default_factory=list)
    after: list[Piece] = field(default_factory=list)
    question: list[Piece] = field(default_factory=list)
    passages: int = 0
    place: int = 0
    """Passages in the prompt, and which of them, from 1, is the relevant one; 0 before there is a prompt."""
    n_tokens: int = 0
    is_in_prompt: bool = True
    """Whether the context stands in the prompt word for word."""

    @classmethod
    def of_context(cls, row: dict[str, Any]) -> "ReaderSample":
        """From a row of contexts."""
        context, checks = text(row, "context"), checks_of(row)
        facts = facts_spans(row)
        return cls(
            key=text(row, "id"),
            id=shortened(text(row, "id"), 120),
            task=shortened(text(row, "task"), 80),
            instruction=shortened(text(row, "instruction"), _SHORT),
            answer=shortened(text(row, "answer"), _ANSWER),
            passage=excerpt(context, text(row, "answer"), facts),
            words=words_of(row),
            has_facts=bool(facts),
            figures=_figures(checks),
            flags=[shortened(str(flag), 60) for flag in checks.get("flags") or ()],
            said=[
                (how, shortened(text(checks, key), _ANSWER))
                for how, key in (("with the context", "model_answer"), ("without it", "closed_book_answer"))
                if isinstance(checks.get(key), str)
            ],
            opening=shortened(" ".join(text(row, "instruction").split()), _LINE, is_told=False),
            ends=(len(context), context[:_ENDS], context[-_ENDS:]),
            instruction_start=text(row, "instruction")[:_ENDS],
        )

    def take_prompt(self, row: dict[str, Any]) -> None:
        """Add the prompt that a row of samples makes of it."""
        messages = row.get("messages") or [{}]
        prompt = "\n\n".join(text(message, "content") for message in messages[:-1])
        self.passages, self.n_tokens = len(row.get("context_seqs") or ()), int(number(row, "n_tokens"))
        self.place = int(number(row, "relevant_index")) + 1
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


class ReaderSamples:
    """Draws contexts to read by task; the same ones whatever the order of the log."""

    def __init__(self) -> None:
        self._drawn: dict[str, BottomK[ReaderSample]] = {}
        self._by_id: dict[str, list[ReaderSample]] | None = None
        self.lowest_gain: BottomK[ReaderSample] = BottomK(3)
        self.unanswered: BottomK[ReaderSample] = BottomK(3)

    def context(self, task: str, row: dict[str, Any]) -> None:
        """Consider a row of contexts."""
        name, checks = text(row, "id"), checks_of(row)
        drawing = self._drawn.setdefault(task, BottomK(NUMBER))
        drawing.offer(drawn("reading", name), lambda: ReaderSample.of_context(row))
        flags = checks.get("flags") or ()
        if "low_context_gain" in flags:
            key = drawn("gain", name, number(checks, "context_gain"))
            self.lowest_gain.offer(key, lambda: ReaderSample.of_context(row))
        if "not_answerable" in flags:
            key = drawn("answer", name, number(checks, "answer_score"))
            self.unanswered.offer(key, lambda: ReaderSample.of_context(row))

    def sample(self, row: dict[str, Any]) -> None:
        """Take the prompt of a row of samples, if its context was drawn; all contexts have been seen."""
        if self._by_id is None:
            chosen = [*self._drawn.values(), self.lowest_gain, self.unanswered]
            self._by_id = {}
            for reading in (one for some in chosen for one in some.items):
                self._by_id.setdefault(reading.key, []).append(reading)
        for reading in self._by_id.get(text(row, "id"), ()):
            reading.take_prompt(row)

    def spread(self) -> list[ReaderSample]:
        """Ten, spread over the tasks; those that have a prompt first."""
        by_task = [
            sorted(self._drawn[task].items, key=lambda reading: not reading.passages)
            for task in sorted(self._drawn)
        ]
        turns = (one for turn in zip_longest(*by_task) for one in turn if one is not None)
        return [reading for _, reading in zip(range(NUMBER), turns, strict=False)]


def facts_spans(row: dict[str, Any]) -> list[Span]:
    """Where in a context of the recipe `sections` those sections stand that were to hold the facts.

    About: the log has their tokens, not their characters; each is made to begin at a paragraph.
    """
    checks, context = checks_of(row), text(row, "context")
    wanted, sections = numbers(checks, "fact_sections"), int(number(checks, "sections"))
    if not wanted or sections < 1 or not context:
        return []
    tokens = [number(step, "completion_tokens") for step in (row.get("steps") or [])[1:]]
    if len(tokens) != sections or not sum(tokens):  # summaries stand among them
        tokens = [1.0] * sections
    edges = [len(context) * sum(tokens[:place]) / sum(tokens) for place in range(sections + 1)]
    starts = [_paragraph(context, round(edge)) for edge in edges]
    return [(starts[place], starts[place + 1]) for place in wanted if 0 <= place < sections]


def _paragraph(context: str, place: int) -> int:
    """The nearest beginning of a paragraph."""
    if place <= 0 or place >= len(context):
        return max(0, min(place, len(context)))
    before, after = context.rfind("\n\n", 0, place + 2), context.find("\n\n", place)
    near = [found + 2 for found in (before, after) if found >= 0 and abs(found + 2 - place) <= _SNAP]
    return min(near, key=lambda found: abs(found - place), default=place)


def _figures(checks: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    if isinstance(checks.get("context_gain"), int | float):
        found.append(("context gain", f"{checks['context_gain']:+.2f} nats a token"))
    metric = {"f1": "F1", "rouge_l": "ROUGE-L"}.get(text(checks, "answer_metric"), "answer score")
    if isinstance(checks.get("answer_score"), int | float):
        found.append((metric, f"{checks['answer_score']:.2f}"))
    if isinstance(checks.get("closed_book_score"), int | float):
        found.append(("closed-book", f"{checks['closed_book_score']:.2f}"))
    return found
