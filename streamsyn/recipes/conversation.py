"""A conversation that only grows: every next request begins with all that was said before."""

from collections.abc import Callable, Generator
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
        beginnings: As `Request.beginnings`, for each request.
        tries: Answers asked for, in all, when one will not do.
    """

    def __init__(self, opening: Opening, group: str, beginnings: tuple[str, ...], tries: int) -> None:
        *self._messages, first = opening.messages
        self.question = first["content"]
        """The first question, for `ask`."""
        self._group = group
        self._beginnings = beginnings
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
