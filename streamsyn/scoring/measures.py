"""The two measures of a context that ask a model: context gain and answerability.

`Gain`: how much likelier the gold answer becomes with the context. `Answers`: whether a model finds the
answer in the context, and whether it already knows it without one (closed-book).
"""

from dataclasses import dataclass
from typing import Any

from streamsyn.records import Request
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
    """

    def __init__(self, prompt: AnswerPrompt, max_tokens: int) -> None:
        self._prompt = prompt
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
        """The model's answer with a context, or without one. Reasoning in front of it is left out.

        Raises:
            ServerError: The request failed.
        """
        messages = self._prompt.messages(question, context)
        completion = await client.complete(Request(messages, self._sampling, context_group(context)))
        return completion.text.strip()
