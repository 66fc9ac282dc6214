"""The state of a long document written section by section: its length, its facts, its conversation."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from math import ceil
from random import Random
from typing import Any, Literal

from streamsyn.config.sections import RecipeSection
from streamsyn.recipes.checks import Failure, thinking_failure
from streamsyn.recipes.recipe import RejectedDraft
from streamsyn.records import Completion, Draft, Request, digest

_SECTION_PARTS = 4
"""The document is complete when less than a quarter of a section is missing."""
_MAX_SECTIONS_FACTOR = 4
"""Factor of the planned number of sections at which writing stops, since models may write short ones."""
MAX_FACT_SECTIONS = 4
"""Maximum number of sections that facts are spread over."""


class Manuscript:
    """The sections written so far, and how many tokens are missing.

    Args:
        target_tokens: Length of the document in tokens, never exceeded.
        section_tokens: Maximum tokens of a section.
    """

    def __init__(self, target_tokens: int, section_tokens: int) -> None:
        self._target_tokens = target_tokens
        self._section_tokens = section_tokens
        self.planned = ceil(target_tokens / section_tokens)
        """Number of sections if each has the maximum length."""
        self._max_sections = _MAX_SECTIONS_FACTOR * self.planned
        self.sections: list[str] = []
        self.cut: list[int] = []
        """Numbers, from 0, of the sections that were cut at their maximum length."""
        self.tokens = 0

    @property
    def goes_on(self) -> bool:
        """Whether a next section is needed."""
        return not self.sections or not self._ends_at(self.tokens, len(self.sections))

    @property
    def was_cut(self) -> bool:
        """Whether the last section was cut."""
        return bool(self.cut) and self.cut[-1] == len(self.sections) - 1

    @property
    def is_complete(self) -> bool:
        """Whether less than a quarter of a section is missing."""
        return self._target_tokens - self.tokens < self._section_tokens / _SECTION_PARTS

    @property
    def next_tokens(self) -> int:
        """Maximum tokens of the next section, so that the target is not exceeded."""
        return min(self._section_tokens, self._target_tokens - self.tokens)

    @property
    def may_end(self) -> bool:
        """Whether the next section is the last one if it has the maximum length."""
        return self._ends_at(self.tokens + self.next_tokens, len(self.sections) + 1)

    def ends_with(self, completion: Completion) -> bool:
        """Whether the document ends with this section."""
        return self._ends_at(self.tokens + completion.text_tokens, len(self.sections) + 1)

    @property
    def should_end(self) -> bool:
        """Whether the next section is the last one if it is as long as the others."""
        return self._ends_at(self.tokens + self._expected, len(self.sections) + 1)

    def span(self) -> tuple[float, float]:
        """Return the expected start and end of the next section, as fractions of the target."""
        return self.tokens / self._target_tokens, (self.tokens + self._expected) / self._target_tokens

    def add(self, text: str, completion: Completion) -> None:
        """Add a section."""
        if completion.finish_reason == "length":
            self.cut.append(len(self.sections))
        self.sections.append(text)
        self.tokens += completion.text_tokens

    def text(self) -> str:
        """Return the document. A section that was cut and the next one form one paragraph."""
        parts: list[str] = []
        for number, section in enumerate(self.sections):
            if number:
                parts.append(" " if number - 1 in self.cut else "\n\n")
            parts.append(section)
        return "".join(parts)

    @property
    def _expected(self) -> int:
        written = len(self.sections)
        return min(self.next_tokens, self.tokens // written) if written else self.next_tokens

    def _ends_at(self, tokens: int, sections: int) -> bool:
        return (
            self._target_tokens - tokens < self._section_tokens / _SECTION_PARTS
            or sections >= self._max_sections
        )


def title_between(headings: Sequence[str], begins: float, ends: float) -> str:
    """Return the headings of the part between two fractions of a document, joined by "; "; "" without any."""
    if not headings:
        return ""
    first = min(int(begins * len(headings)), len(headings) - 1)
    # slightly less, so that a part that ends where a heading starts does not include it
    last = min(max(int(ends * len(headings) - 1e-9), first), len(headings) - 1)
    return "; ".join(headings[first : last + 1])


class FactPlan:
    """The places of the facts that the answer rests on, drawn uniformly over the length of a document.

    A model tuned on contexts whose facts always stand in one place learns where to look instead of reading.
    (arXiv 2502.15592 shuffles the relevant context among distractors; this does the same within a context.)

    Args:
        draft: The draft, whose key seeds the draw: a resumed draft gets the same places.
        facts: `recipe.facts`.
        sections: Expected number of sections.
    """

    def __init__(self, draft: Draft, facts: Literal["one", "spread"], sections: int) -> None:
        rng = Random(digest(draft.key, "facts"))
        self._parts = 1 if facts == "one" else min(MAX_FACT_SECTIONS, sections)
        self._pending = [(part + rng.random()) / self._parts for part in range(self._parts)]
        self.sections: list[int] = []
        """Numbers, from 0, of the sections that were asked to contain facts."""

    def ask(self, section: int, reaches: float, *, is_last: bool) -> str:
        """Return which facts to ask of a section, as the template variable `facts`.

        Args:
            section: Number of the section, from 0.
            reaches: Expected fraction of the document at the end of the section.
            is_last: Whether it may be the last section, which must contain all remaining facts.

        Returns:
            `all`, `some` or `rest` of the facts; `later` before the first ones, `done` after the last.
        """
        if not self._pending:
            return "done"
        is_due = is_last or self._pending[0] < reaches
        if not is_due:
            return "later" if not self.sections else "done"
        self._pending = [] if is_last else [depth for depth in self._pending if depth >= reaches]
        is_first, is_rest = not self.sections, not self._pending
        self.sections.append(section)
        if is_first and is_rest:
            return "all"
        return "rest" if is_rest else "some"

    def depth(self, lengths: Sequence[int]) -> float:
        """Return the mean depth of the middles of these sections, from 0 (start) to 1 (end).

        Args:
            lengths: Characters of each section.
        """
        total = max(1, sum(lengths))
        middles = [sum(lengths[:section]) + lengths[section] / 2 for section in self.sections]
        return round(sum(middles) / len(middles) / total, 4) if middles else 0.0


class Conversation:
    """A conversation that only grows, with verbatim answers: each request starts with a cached prefix.

    Args:
        first: Its first request; the last message is the first question. The other requests differ from it
            in their messages and sampling parameters.
        recipe: Its `tries` is the maximum number of answers per step.
    """

    def __init__(self, first: Request, recipe: RecipeSection) -> None:
        *self._messages, question = first.messages
        self.question = question["content"]
        """The first question, for `ask`."""
        self._first = first
        self._recipe = recipe
        self.tokens = 0
        """Tokens of the whole conversation, as the server counted them at the last answer."""
        self.answers: list[Completion] = []
        """The answers that passed their check."""

    def ask(
        self, question: str, sampling: dict[str, Any], check: Callable[[Completion], Failure | None]
    ) -> Generator[Request, Completion, Completion]:
        """Ask the next question. If the answer fails `check`, only this step is tried again.

        Raises:
            RejectedDraft: All tries failed.
        """
        messages = [*self._messages, {"role": "user", "content": question}]
        request = replace(self._first, messages=messages, sampling=sampling)
        failure: Failure | None = None
        for _ in range(self._recipe.tries):
            completion = yield request
            failure = thinking_failure(completion, self._recipe) or check(completion)
            if failure is None:
                self._messages = [*messages, {"role": "assistant", "content": completion.text}]
                self.tokens = completion.prompt_tokens + completion.text_tokens
                self.answers.append(completion)
                return completion
        assert failure is not None, "recipe.tries is at least one"
        raise RejectedDraft(
            failure.reason,
            f"{failure.detail} (step {len(self.answers) + 1}, the last of {self._recipe.tries} tries)",
        )

    def restart(self) -> None:
        """Drop all messages after the first question and its answer. All completions stay in `answers`."""
        is_system = self._messages[0]["role"] == "system"
        self._messages = self._messages[: 2 + is_system]
        self.tokens = 0
