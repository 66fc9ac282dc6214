"""A conversation that only grows: every next request begins with all that was said before.

A document that is being written section by section, measured in the server's tokens.
"""

from collections.abc import Callable, Generator
from math import ceil
from typing import Any

from streamsyn.recipes.checks import Failure
from streamsyn.recipes.prompt import Opening
from streamsyn.recipes.recipe import RejectedDraft
from streamsyn.records import Completion, Request


class Conversation:
    """Messages so far, each answer as the model gave it: to change a character would cost the prefix cache.

    Args:
        opening: Its first messages; the last of them is the first question.
        group: As `Request.group`, for each request.
        prefixes: As `Request.prefixes`, for each request.
        tries: Answers asked for, in all, when one will not do.
    """

    def __init__(self, opening: Opening, group: str, prefixes: tuple[str, ...], tries: int) -> None:
        *self._messages, first = opening.messages
        self.question = first["content"]
        """The first question, for `ask`."""
        self._group = group
        self._beginnings = prefixes
        self._tries = tries
        self.tokens = 0
        """Tokens of all of it, as the server counted them at the last answer."""
        self.answers: list[Completion] = []
        """Those that were kept."""

    def ask(
        self, question: str, sampling: dict[str, Any], check: Callable[[Completion], Failure | None]
    ) -> Generator[Request, Completion, Completion]:
        """The answer to one more question; one that fails `check` is asked for afresh, this step alone.

        Raises:
            RejectedDraft: The last try failed too.
        """
        messages = [*self._messages, {"role": "user", "content": question}]
        request = Request(messages, sampling, self._group, self._beginnings)
        failure: Failure | None = None
        for _ in range(self._tries):
            completion = yield request
            failure = check(completion)
            if failure is None:
                self._messages = [*messages, {"role": "assistant", "content": completion.text}]
                self.tokens = completion.prompt_tokens + completion.completion_tokens
                self.answers.append(completion)
                return completion
        assert failure is not None, "recipe.tries is at least one"
        raise RejectedDraft(
            failure.reason,
            f"{failure.detail} (step {len(self.answers) + 1}, the last of {self._tries} tries)",
        )

    def begin_again(self) -> None:
        """Forget all but the first question and its answer; what has been forgotten stays in `answers`."""
        is_system = self._messages[0]["role"] == "system"
        self._messages = self._messages[: 2 + is_system]
        self.tokens = 0


_QUARTER = 4
"""Nothing shorter than this part of a section is asked for: the document ends there."""
_PATIENCE = 4
"""So many times the sections that were planned are asked for at most; models may write short ones."""


class Manuscript:
    """The sections so far, and how much is missing.

    Args:
        target_tokens: Length to write up to.
        section_tokens: Longest section.
    """

    def __init__(self, target_tokens: int, section_tokens: int) -> None:
        self._target = target_tokens
        self._section = section_tokens
        self.planned = ceil(target_tokens / section_tokens)
        """Sections there will be when each is as long as it may be."""
        self._most = _PATIENCE * self.planned
        self.sections: list[str] = []
        self.cut: list[int] = []
        """Numbers, from 0, of the sections that ended at their longest, in the middle of something."""
        self.tokens = 0

    @property
    def goes_on(self) -> bool:
        """Whether there is to be another section."""
        return not self.sections or not self._ends_at(self.tokens, len(self.sections))

    @property
    def was_cut(self) -> bool:
        """Whether the last section was."""
        return bool(self.cut) and self.cut[-1] == len(self.sections) - 1

    @property
    def is_complete(self) -> bool:
        """Whether it is as long as was asked for, but for a quarter of a section."""
        return self._target - self.tokens < self._section / _QUARTER

    @property
    def next_tokens(self) -> int:
        """Longest answer for the next section: the target is never passed."""
        return min(self._section, self._target - self.tokens)

    @property
    def may_end(self) -> bool:
        """Whether the next section may be the last one, if it is as long as it may be."""
        return self._ends_at(self.tokens + self.next_tokens, len(self.sections) + 1)

    def ends_with(self, completion: Completion) -> bool:
        """Whether it ends with this section."""
        return self._ends_at(self.tokens + completion.completion_tokens, len(self.sections) + 1)

    @property
    def should_end(self) -> bool:
        """Whether the next section will be the last one, if it is as long as the others."""
        return self._ends_at(self.tokens + self._expected, len(self.sections) + 1)

    def span(self) -> tuple[float, float]:
        """Shares of the target between which the next section will lie, if it is as long as the others."""
        return self.tokens / self._target, (self.tokens + self._expected) / self._target

    def add(self, text: str, completion: Completion) -> None:
        """Add a section."""
        if completion.finish_reason == "length":
            self.cut.append(len(self.sections))
        self.sections.append(text)
        self.tokens += completion.completion_tokens

    def text(self) -> str:
        """The document: a section that was cut and the next are one paragraph."""
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
        return self._target - tokens < self._section / _QUARTER or sections >= self._most
