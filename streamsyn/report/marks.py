"""Marks of the facts that a verdict rests on, and how figures are put into words."""

from dataclasses import dataclass, field
from enum import IntEnum


class Mark(IntEnum):
    """How good a fact is; the greatest counts."""

    UNKNOWN = 0
    GOOD = 1
    LOOK = 2
    BAD = 3

    @property
    def css(self) -> str:
        """Its class."""
        return self.name.lower()


@dataclass(slots=True)
class Fact:
    """One thing that decides: a name, a figure for a glance, sentences, and the worst of their marks."""

    name: str
    figure: str = ""
    mark: Mark = Mark.UNKNOWN
    said: list[tuple[Mark, str]] = field(default_factory=list)
    worst: str = ""
    """The sentence that the mark is from."""

    def say(self, mark: Mark, sentence: str, figure: str = "") -> None:
        """Add a part; the figure of the worst one stands for all."""
        if mark > self.mark or not self.said:
            self.worst = sentence
            self.figure = figure or self.figure
        self.mark = max(self.mark, mark)
        self.said.append((mark, sentence))


def grade_low(share: float, look: float, bad: float) -> Mark:
    """The mark of a share that should be low."""
    return Mark.BAD if share > bad else Mark.LOOK if share > look else Mark.GOOD


def grade_high(share: float, good: float, look: float) -> Mark:
    """The mark of a share that should be high."""
    return Mark.GOOD if share >= good else Mark.LOOK if share >= look else Mark.BAD


def percent(part: float, whole: float) -> str:
    """A share; 0% and 100% only where they are exact."""
    if not whole or not part:
        return "0%"
    share = 100 * part / whole
    if share < 0.1:
        return "<0.1%"
    if part != whole and share > 99.9:
        return ">99.9%"
    return f"{share:.1f}%" if share < 10 or 99 < share < 100 else f"{share:.0f}%"


def counted(number: int, noun: str) -> str:
    """`1 context`, `2,000 contexts`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
