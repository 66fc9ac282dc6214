"""Whether a model finds the answer in the context, and whether it knows it anyway."""

import re
from typing import Any

from streamsyn.records import Request
from streamsyn.scoring.asking import Asking, context_group
from streamsyn.scoring.metrics import measured
from streamsyn.scoring.once import Once
from streamsyn.scoring.prompts import AnswerPrompt, Question

_THOUGHTS = re.compile(r"\A\s*<think>.*?(?:</think>|\Z)", re.DOTALL)


class Answers:
    """Has questions answered and compares the answers with the gold ones. Closed-book, once a question.

    Args:
        prompt: How the question is put: as `Gain` puts it, so that servers have its prefix in their caches.
        max_tokens: Longest answer.
    """

    def __init__(self, prompt: AnswerPrompt, max_tokens: int) -> None:
        self._prompt = prompt
        self._sampling = {"temperature": 0, "max_tokens": max_tokens}
        self._closed_book: Once[str] = Once()

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
        return spoken(completion.text)


def spoken(text: str) -> str:
    """What a model said, without what it thought before that; nothing when its thoughts had no end."""
    return _THOUGHTS.sub("", text).strip()
