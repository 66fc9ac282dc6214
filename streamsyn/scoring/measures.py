"""The two measures of a context that ask a model: context gain and answerability.

`Gain`: how much likelier the gold answer becomes with the context. `Answers`: whether a model finds the
answer in the context, and whether it already knows it without one (closed-book).
"""

from dataclasses import dataclass
from typing import Any

from streamsyn.errors import BrokenResponse
from streamsyn.fleet.thinking import Mode
from streamsyn.records import Completion, Request
from streamsyn.scoring.requests import AnswerPrompt, Question, ScoringClient, SingleFlight, context_group


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
