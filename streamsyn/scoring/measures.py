"""The two measures of a context that ask a model: context gain and answerability.

`Gain`: how much likelier the gold answer becomes with the context. `Answers`: whether a model finds the
answer in the context, and whether it already knows it without one (closed-book). Both use `Question` and its
prompt, `ScoringClient`, which counts the cost, and `SingleFlight`, which shares results between drafts.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from streamsyn.errors import BrokenResponse
from streamsyn.fleet.fleet import Fleet
from streamsyn.fleet.thinking import Mode, switched
from streamsyn.records import ANSWERS, Attempt, Completion, Request, digest
from streamsyn.scoring.answer_metrics import Metric, answer_score, metric_of
from streamsyn.templates import PromptTemplate, packaged, read

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """A cache of results by key. Concurrent callers with the same key share one computation.

    Args:
        max_results: Maximum number of results; the least recently used are dropped first.
    """

    def __init__(self, max_results: int = 16_384) -> None:
        self._max_results = max_results
        self._results: OrderedDict[bytes, asyncio.Future[T]] = OrderedDict()

    async def get(self, key: bytes, work: Callable[[], Awaitable[T]]) -> T:
        """Return the result for `key`, from the cache or from `work`.

        If `work` fails, only its own caller gets the error. The next waiting caller computes again.
        """
        while (result := self._results.get(key)) is not None:
            self._results.move_to_end(key)
            await asyncio.wait([result])  # unlike `await result`, it does not cancel the result with us
            if not result.cancelled():
                return result.result()
        return await self._compute(key, work)

    async def _compute(self, key: bytes, work: Callable[[], Awaitable[T]]) -> T:
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._results[key] = result
        while len(self._results) > self._max_results:
            self._results.popitem(last=False)
        try:
            result.set_result(await work())
        finally:
            if not result.done():
                if self._results.get(key) is result:
                    del self._results[key]
                result.cancel()
        return result.result()


class ScoringClient:
    """Sends the requests that score one context, and counts their cost apart from that of writing it.

    Args:
        fleet: The servers.
        model: The model that scores.

    Attributes:
        prompt_tokens: Prompt tokens of all requests.
        cached_tokens: Those of them that servers had in their caches.
    """

    def __init__(self, fleet: Fleet, model: str) -> None:
        self._fleet = fleet
        self._model = model
        self._attempts: list[Attempt] = []
        self.prompt_tokens = 0
        self.cached_tokens = 0

    @property
    def completion_tokens(self) -> int:
        """Tokens that servers generated, including failed attempts."""
        return sum(attempt.completion_tokens for attempt in self._attempts)

    @property
    def retries(self) -> int:
        """The number of failed attempts."""
        return sum(attempt.error is not None for attempt in self._attempts)

    async def complete(self, request: Request, thinking: Mode = "off", *, more_tokens: int = 0) -> Completion:
        """Send a request.

        Args:
            request: The request.
            thinking: Whether the model should think.
            more_tokens: Room for the thought in tokens.

        Raises:
            ServerError: It failed, after retries.
            StoppedEarly: The run is draining.
        """
        sent = switched(request, thinking, self._model, more_tokens=more_tokens)
        completion = await self._fleet.complete(sent, self._attempts, self._model)
        self.prompt_tokens += completion.prompt_tokens
        self.cached_tokens += completion.cached_tokens
        return completion

    def cost(self) -> dict[str, int]:
        """The cost, as it is stored in the context's checks."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
        }


def context_group(context: str) -> str:
    """The prefix group of all requests about one context, which keeps them on one server."""
    return digest("scored", context).hex() if context else ""


_EXAMPLE: dict[str, Any] = {"context": "c", "instruction": "i", "task": "t", "kind": "question"}


@dataclass(frozen=True, slots=True)
class Question:
    """An instruction and its gold answer, from the seed or written with the context.

    Attributes:
        instruction: The instruction.
        answer: The gold answer.
        task: The name of its task.
        also_right: Other answers that count as right.
    """

    instruction: str
    answer: str
    task: str
    also_right: tuple[str, ...] = ()

    def score(self, answer: str) -> float:
        """The score of an answer against the right answer that it is closest to, from 0 to 1."""
        return max(answer_score(self.metric, answer, right) for right in (self.answer, *self.also_right))

    @property
    def metric(self) -> Metric:
        """The metric that compares an answer with the gold answer."""
        return metric_of(self.task, self.answer)

    @property
    def kind(self) -> Literal["question", "summary"]:
        """The `kind` variable of the template."""
        return "question" if self.metric == "f1" else "summary"

    @property
    def key(self) -> bytes:
        """A digest, the same for all drafts of one seed."""
        return digest("question", self.task, self.instruction, self.answer)


def other_answers(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The answers beside the gold answer that a seed's metadata lists."""
    answers = metadata.get(ANSWERS)
    if not isinstance(answers, list):
        return ()
    return tuple(answer for answer in answers if isinstance(answer, str) and answer.strip())


class AnswerPrompt:
    """Renders a question, with or without a context, as chat messages.

    Args:
        path: The user's template (`scoring.template`); None for the packaged one.

    Raises:
        ConfigError: The template cannot be read or rendered.
    """

    def __init__(self, path: Path | None = None) -> None:
        source = packaged("prompts", "answer") if path is None else read(path)
        self._template = PromptTemplate("answer" if path is None else str(path), source, _EXAMPLE)
        self.digest = digest(source).hex()
        """Digest of the template's text."""

    def messages(self, question: Question, context: str = "") -> list[dict[str, str]]:
        """One user message; without `context` it has only the question."""
        text = self._template.render(
            context=context, instruction=question.instruction, task=question.task, kind=question.kind
        )
        return [{"role": "user", "content": text}]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Mean negative log-likelihood of an answer in nats per token, and the number of tokens."""

    nll: float
    tokens: int


class Gain:
    """Measures the gain of contexts. The likelihood without a context is requested once per question.

    Args:
        prompt: Renders the question.
        answer_tokens: Only the first `answer_tokens` tokens of the gold answer count.
    """

    def __init__(self, prompt: AnswerPrompt, answer_tokens: int) -> None:
        self._prompt = prompt
        self._sampling = {"max_tokens": answer_tokens}
        self._without: SingleFlight[Likelihood] = SingleFlight()

    async def measure(self, client: ScoringClient, question: Question, context: str) -> dict[str, Any]:
        """Return `context_gain`, `nll_with`, `nll_without` and `scored_tokens`.

        Raises:
            ServerError: A request failed.
        """
        given = await self.likelihood(client, question, context)
        bare = await self._without.get(question.key, lambda: self.likelihood(client, question))
        return {
            "context_gain": round(bare.nll - given.nll, 4),
            "nll_with": round(given.nll, 4),
            "nll_without": round(bare.nll, 4),
            "scored_tokens": given.tokens,
        }

    async def likelihood(self, client: ScoringClient, question: Question, context: str = "") -> Likelihood:
        """The likelihood of the gold answer with a context, or without one.

        Raises:
            ServerError: The request failed.
        """
        messages = self._prompt.messages(question, context)
        completion = await client.complete(
            Request(messages, self._sampling, context_group(context), scored=question.answer)
        )
        tokens = len(completion.logprobs)
        return Likelihood(-sum(completion.logprobs) / tokens, tokens)


class Answers:
    """Has questions answered and compares the answers with the gold ones; closed-book once per question.

    Args:
        prompt: Renders the question; the same as for `Gain`, so that servers have its prefix in their caches.
        max_tokens: Maximum tokens of an answer.
        thinking: Whether the model should think before it.
        thinking_tokens: Tokens added to `max_tokens` for a model that thinks.
    """

    def __init__(
        self, prompt: AnswerPrompt, max_tokens: int, thinking: Mode = "off", thinking_tokens: int = 4096
    ) -> None:
        self._prompt = prompt
        self._thinking: Mode = thinking
        self._thinking_tokens = thinking_tokens
        self._thinks = thinking == "on"
        self._sampling = {"temperature": 0, "max_tokens": max_tokens}
        self._closed_book: SingleFlight[str] = SingleFlight()

    async def measure(self, client: ScoringClient, question: Question, context: str) -> dict[str, Any]:
        """Return `answer_metric`, `answer_score`, `closed_book_score`, `model_answer`, `closed_book_answer`.

        Raises:
            ServerError: A request failed.
        """
        answer = await self.answer(client, question, context)
        closed_book = await self._closed_book.get(question.key, lambda: self.answer(client, question))
        return {
            "answer_metric": question.metric,
            "answer_score": round(question.score(answer), 4),
            "closed_book_score": round(question.score(closed_book), 4),
            "model_answer": answer,
            "closed_book_answer": closed_book,
        }

    async def answer(self, client: ScoringClient, question: Question, context: str = "") -> str:
        """The model's answer with a context, or without one. A thought before it is left out.

        A model that fills its answer with a thought is asked again, with room for one; from then on at once.

        Raises:
            ServerError: The request failed, or the model was still thinking at its maximum of tokens.
        """
        request = Request(self._prompt.messages(question, context), self._sampling, context_group(context))
        had_room = self._thinks
        completion = await self._complete(client, request)
        if completion.is_only_thought and not had_room:
            self._thinks = True
            completion = await self._complete(client, request)
        if completion.is_only_thought:
            raise BrokenResponse(
                "the model was still thinking at scoring.max_answer_tokens + scoring.thinking_tokens = "
                f"{completion.completion_tokens}: raise scoring.thinking_tokens"
            )
        return completion.text.strip()

    async def _complete(self, client: ScoringClient, request: Request) -> Completion:
        more_tokens = self._thinking_tokens if self._thinks else 0
        return await client.complete(request, self._thinking, more_tokens=more_tokens)
