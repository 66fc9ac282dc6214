"""What was measured of contexts: for all of them, and for each task."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from streamsyn.report.histogram import Histogram
from streamsyn.report.rows import checks_of, is_number, number, text, words_of

MOST_TASKS = 24
"""Tasks that are told of one by one."""
OTHER = "(other tasks)"
_NATS, _UNIT = 0.005, 0.005
"""Widths within which gains and scores are not told apart."""


@dataclass(slots=True)
class Scores:
    """Figures of some contexts."""

    contexts: int = 0
    rejects: int = 0
    words: Histogram = field(default_factory=Histogram)
    gain: Histogram = field(default_factory=lambda: Histogram(_NATS))
    positive: int = 0
    """Contexts with a gain above 0."""
    answered: Histogram = field(default_factory=lambda: Histogram(_UNIT))
    closed_book: Histogram = field(default_factory=lambda: Histogram(_UNIT))
    answered_sum: float = 0.0
    closed_book_sum: float = 0.0
    answerable: int = 0
    known: int = 0
    metrics: Counter[str] = field(default_factory=Counter)

    def add(self, row: dict[str, Any], answerable_from: float, known_above: float) -> None:
        """Count a context.

        Args:
            row: Its row in the log.
            answerable_from: Its answer scores at least so much where it is answerable.
            known_above: The answer without it scores more where the model knows it anyway.
        """
        checks = checks_of(row)
        self.contexts += 1
        self.words.add(words_of(row))
        self.gain.add(checks.get("context_gain"))
        self.positive += is_number(checks.get("context_gain")) and checks["context_gain"] > 0
        if is_number(checks.get("answer_score")):
            score = number(checks, "answer_score")
            self.answered.add(score)
            self.answered_sum += score
            self.answerable += score >= answerable_from
            metric = text(checks, "answer_metric")
            self.metrics[metric if metric in ("f1", "rouge_l") else "score"] += 1
        if is_number(checks.get("closed_book_score")):
            score = number(checks, "closed_book_score")
            self.closed_book.add(score)
            self.closed_book_sum += score
            self.known += score > known_above

    @property
    def metric(self) -> str:
        """The name of the score most of them have."""
        names = {"f1": "F1", "rouge_l": "ROUGE-L"}
        return " / ".join(names.get(name, "score") for name, _ in sorted(self.metrics.items()))


class ByTask:
    """Scores by task; those of the tasks that come when there are many already are one."""

    def __init__(self) -> None:
        self._tasks: dict[str, Scores] = {}

    def name(self, task: str) -> str:
        """What a task is counted as."""
        return task if task in self._tasks or len(self._tasks) < MOST_TASKS else OTHER

    def of(self, task: str) -> Scores:
        """The scores of a task."""
        return self._tasks.setdefault(self.name(task), Scores())

    def sorted(self) -> list[tuple[str, Scores]]:
        """By name; the other ones are last."""
        return sorted(self._tasks.items(), key=lambda named: (named[0] == OTHER, named[0]))
