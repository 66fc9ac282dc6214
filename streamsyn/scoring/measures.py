"""How much likelier the gold answer is with the context: what makes it worth training on.

How near an answer is to the gold one: F1 of words, and ROUGE-L. Both from 0 to 1.

Sources: the normalisation and F1 are those of SQuAD's evaluation script (Rajpurkar et al., arXiv 1606.05250),
which LongBench (arXiv 2308.14508) uses for its questions; ROUGE-L is of Lin, "ROUGE: A Package for Automatic
Evaluation of Summaries", 2004, words and F-measure as in the package `rouge_score` without stemming.

Whether a model finds the answer in the context, and whether it knows it anyway.
"""

from dataclasses import dataclass
from typing import Any

from streamsyn.recipes.parsing import without_thoughts
from streamsyn.records import Request
from streamsyn.scoring.answer_metrics import measured
from streamsyn.scoring.requests import AnswerPrompt, Asking, Question, SingleFlight, context_group


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
        self._without: SingleFlight[Likelihood] = SingleFlight()

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


class Answers:
    """Has questions answered and compares the answers with the gold ones. Closed-book, once a question.

    Args:
        prompt: How the question is put: as `Gain` puts it, so that servers have its prefix in their caches.
        max_tokens: Longest answer.
    """

    def __init__(self, prompt: AnswerPrompt, max_tokens: int) -> None:
        self._prompt = prompt
        self._sampling = {"temperature": 0, "max_tokens": max_tokens}
        self._closed_book: SingleFlight[str] = SingleFlight()

    async def measure(self, asking: Asking, question: Question, context: str) -> dict[str, Any]:
        """`answer_metric`, `answer_score`, `closed_book_score`, `model_answer`, `closed_book_answer`.

        Raises:
            ServerError: It could not be found out.
        """
        said = await self.answer(asking, question, context)
        knew = await self._closed_book.get(question.key, lambda: self.answer(asking, question))
        metric = question.metric
        return {
            "answer_metric": metric,
            "answer_score": round(measured(metric, said, question.answer), 4),
            "closed_book_score": round(measured(metric, knew, question.answer), 4),
            "model_answer": said,
            "closed_book_answer": knew,
        }

    async def answer(self, asking: Asking, question: Question, context: str = "") -> str:
        """What the model answers, given a context or none; its thoughts are left out.

        Raises:
            ServerError: It gave no answer.
        """
        messages = self._prompt.messages(question, context)
        completion = await asking.ask(Request(messages, self._sampling, context_group(context)))
        return without_thoughts(completion.text)
