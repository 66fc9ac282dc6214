"""Where in a long document the facts stand that its answer rests on.

A model tuned on contexts whose facts always stand at the start, or always in the middle, learns where to
look rather than to read; so the place is drawn, evenly over the length, for each draft. (arXiv 2502.15592
shuffles the relevant context among its distractors for that; here it is about the facts within one.)
"""

from collections.abc import Sequence
from random import Random
from typing import Literal

from streamsyn.records import Draft, digest

SPREAD = 4
"""Sections that facts are spread over, at most."""


class FactPlan:
    """The places drawn for one draft, and which sections they turned out to be.

    Args:
        draft: Its key is all that is drawn from: the same draft always has the same places.
        facts: `recipe.facts`.
        sections: How many sections there will be, about.
    """

    def __init__(self, draft: Draft, facts: Literal["one", "spread"], sections: int) -> None:
        draw = Random(digest(draft.key, "facts"))
        self._parts = 1 if facts == "one" else min(SPREAD, sections)
        self._due = [(part + draw.random()) / self._parts for part in range(self._parts)]
        self.sections: list[int] = []
        """Numbers, from 0, of the sections that were asked to hold facts."""

    def ask(self, section: int, reaches: float, *, is_last: bool) -> str:
        """What `section` is told of the facts.

        Args:
            section: Its number.
            reaches: The share of the document that is expected to be written when it ends.
            is_last: Whether it may be the last one, which has to hold whatever is still untold.

        Returns:
            One of: all, some, rest (of them stand here), later (not yet), done.
        """
        if not self._due:
            return "done"
        is_due = is_last or self._due[0] < reaches
        if not is_due:
            return "later" if not self.sections else "done"
        self._due = [] if is_last else [depth for depth in self._due if depth >= reaches]
        is_first, is_rest = not self.sections, not self._due
        self.sections.append(section)
        if is_first and is_rest:
            return "all"
        return "rest" if is_rest else "some"

    def depth(self, lengths: Sequence[int]) -> float:
        """Where the middle of these sections lies, 0 at the start and 1 at the end; their mean.

        Args:
            lengths: Characters of each section.
        """
        total = max(1, sum(lengths))
        middles = [sum(lengths[:section]) + lengths[section] / 2 for section in self.sections]
        return round(sum(middles) / len(middles) / total, 4) if middles else 0.0
