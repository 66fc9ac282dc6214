"""Asks the fleet that scores, and adds up what that costs."""

from streamsyn.records import Attempt, Completion, Request, digest
from streamsyn.sglang.fleet import Fleet


class Asking:
    """The requests that score one context: none of them is one of the context's own.

    Args:
        fleet: Whom to ask.
        model: Who is to answer.

    Attributes:
        prompt_tokens: Of all answers.
        cached_tokens: Those among them that servers had in their caches.
    """

    def __init__(self, fleet: Fleet, model: str) -> None:
        self._fleet = fleet
        self._model = model
        self._attempts: list[Attempt] = []
        self.prompt_tokens = 0
        self.cached_tokens = 0

    @property
    def completion_tokens(self) -> int:
        """What servers wrote, that of tries that failed too."""
        return sum(attempt.completion_tokens for attempt in self._attempts)

    @property
    def retries(self) -> int:
        """Tries that brought no answer."""
        return sum(attempt.error is not None for attempt in self._attempts)

    async def ask(self, request: Request) -> Completion:
        """The answer to `request`.

        Raises:
            ServerError: There is none.
            StoppedEarly: The run is draining.
        """
        completion = await self._fleet.complete(request, self._attempts, self._model)
        self.prompt_tokens += completion.prompt_tokens
        self.cached_tokens += completion.cached_tokens
        return completion

    def figures(self) -> dict[str, int]:
        """What stays with the context."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
        }


def context_group(context: str) -> str:
    """The group of all requests about one context: they go to one server, and share its prefix there."""
    return digest("scored", context).hex() if context else ""
