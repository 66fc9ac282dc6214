"""Asks the fleet that scores, and adds up what that costs.

What is asked of the model that scores: the instruction, with a context before it or without.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from streamsyn.fleet.fleet import Fleet
from streamsyn.records import Attempt, Completion, Request, digest
from streamsyn.scoring.answer_metrics import Metric, metric_of
from streamsyn.templates import PromptTemplate, packaged, read

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Results by key. Who asks for one that is being worked out waits for it.

    Args:
        most: So many are remembered; those asked for least recently go first.
    """

    def __init__(self, most: int = 16_384) -> None:
        self._most = most
        self._results: OrderedDict[bytes, asyncio.Future[T]] = OrderedDict()

    async def get(self, key: bytes, work: Callable[[], Awaitable[T]]) -> T:
        """The result for `key`: a remembered one, or what `work` gives.

        When it fails that is for its caller alone: the next one who waits works it out again.
        """
        while (result := self._results.get(key)) is not None:
            self._results.move_to_end(key)
            await asyncio.wait([result])  # unlike `await result`, this leaves it alone when we are cancelled
            if not result.cancelled():
                return result.result()
        return await self._work_out(key, work)

    async def _work_out(self, key: bytes, work: Callable[[], Awaitable[T]]) -> T:
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._results[key] = result
        while len(self._results) > self._most:
            self._results.popitem(last=False)
        try:
            result.set_result(await work())
        finally:
            if not result.done():
                if self._results.get(key) is result:
                    del self._results[key]
                result.cancel()
        return result.result()


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


_EXAMPLE: dict[str, Any] = {"context": "c", "instruction": "i", "task": "t", "kind": "question"}


@dataclass(frozen=True, slots=True)
class Question:
    """An instruction and its gold answer, whoever wrote them."""

    instruction: str
    answer: str
    task: str

    @property
    def metric(self) -> Metric:
        """By what an answer to it is compared with the gold one."""
        return metric_of(self.task, self.answer)

    @property
    def kind(self) -> Literal["question", "summary"]:
        """What the template is told."""
        return "question" if self.metric == "f1" else "summary"

    @property
    def key(self) -> bytes:
        """Stands for it: drafts of one seed have it in common."""
        return digest("question", self.task, self.instruction, self.answer)


class AnswerPrompt:
    """Renders the question.

    Args:
        path: The user's template; None for the packaged one.

    Raises:
        ConfigError: It cannot be used.
    """

    def __init__(self, path: Path | None = None) -> None:
        source = packaged("prompts", "answer") if path is None else read(path)
        self._template = PromptTemplate("answer" if path is None else str(path), source, _EXAMPLE)
        self.digest = digest(source).hex()
        """Stands for its text."""

    def messages(self, question: Question, context: str = "") -> list[dict[str, str]]:
        """One message of the user's; without `context` the model has only the question."""
        text = self._template.render(
            context=context, instruction=question.instruction, task=question.task, kind=question.kind
        )
        return [{"role": "user", "content": text}]
