"""How much likelier the gold answer is with the context: what makes it worth training on."""

from dataclasses import dataclass
from typing import Any

from streamsyn.records import Request
from streamsyn.scoring.asking import Asking, context_group
from streamsyn.scoring.once import Once
from streamsyn.scoring.prompts import AnswerPrompt, Question


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Mean negative log-likelihood of an answer, in nats a token, and how many tokens that is of."""

    nll: float
    tokens: int


class Gain:
    """Measures the gain of contexts. What the answer costs without one is asked once a question.

    Args:
        prompt: How the question is put.
        answer_tokens: Of a longer gold answer only so many first tokens count.
    """

    def __init__(self, prompt: AnswerPrompt, answer_tokens: int) -> None:
        self._prompt = prompt
        self._sampling = {"max_tokens": answer_tokens}
        self._without: Once[Likelihood] = Once()

    async def measure(self, asking: Asking, question: Question, context: str) -> dict[str, Any]:
        """`context_gain`, `nll_with`, `nll_without` and `scored_tokens`.

        Raises:
            ServerError: It could not be found out.
        """
        given = await self.likelihood(asking, question, context)
        bare = await self._without.get(question.key, lambda: self.likelihood(asking, question))
        return {
            "context_gain": round(bare.nll - given.nll, 4),
            "nll_with": round(given.nll, 4),
            "nll_without": round(bare.nll, 4),
            "scored_tokens": given.tokens,
        }

    async def likelihood(self, asking: Asking, question: Question, context: str = "") -> Likelihood:
        """How likely the gold answer is, given a context or none.

        Raises:
            ServerError: It could not be found out.
        """
        messages = self._prompt.messages(question, context)
        completion = await asking.ask(
            Request(messages, self._sampling, context_group(context), scored=question.answer)
        )
        tokens = len(completion.logprobs)
        return Likelihood(-sum(completion.logprobs) / tokens, tokens)
