"""A question that the tuned model answers while it is trained, and how its answer is graded.

From answers to figures, and to a file that a person can read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Literal, TypeAlias

import orjson

from streamsyn.errors import SinkError
from streamsyn.io.durable import write_whole
from streamsyn.recipes.parsing import without_thoughts
from streamsyn.scoring.answer_metrics import measured
from streamsyn.trainer.commands import Prompt
from streamsyn.trainer.evaluation.answering import Chat

Grading: TypeAlias = Literal["recall", "f1", "rouge_l"]


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A prompt, and what is known of its answer.

    Attributes:
        exam: What it belongs to: `needles` or `longbench`.
        part: Questions of the same part have a figure together: `needle_single_2048`.
        id: Tells it from others of its part.
        wanted: With `recall`, texts that ought all to stand in the answer; else answers, each of them right.
    """

    exam: str
    part: str
    id: str
    prompt: Prompt
    wanted: tuple[str, ...]
    grading: Grading

    def score(self, answer: str) -> float:
        """How good an answer is, from 0 to 1."""
        said = without_thoughts(answer)
        if self.grading == "recall":
            return recall(said, self.wanted)
        metric = self.grading
        return max(measured(metric, said, gold) for gold in self.wanted)


def recall(said: str, wanted: Sequence[str]) -> float:
    """The share of `wanted` that stands in what was said; case aside (RULER, arXiv 2404.06654)."""
    lowered = said.lower()
    return sum(one.lower() in lowered for one in wanted) / len(wanted)


FOLDER = "answers"


class Exam:
    """All questions of a training.

    Args:
        questions: Those of a part stand together, as do the parts of an exam.
        chat: Turns answers into text.
        out: Where the training keeps its files.
    """

    def __init__(self, questions: Sequence[Question], chat: Chat, out: Path) -> None:
        self.questions = tuple(questions)
        self._chat = chat
        self._folder = out / FOLDER

    @property
    def names(self) -> frozenset[str]:
        """The figures that say that an exam was finished."""
        return frozenset(question.exam for question in self.questions)

    def grade(self, step: int, answers: Sequence[Sequence[int]]) -> dict[str, float]:
        """The mean score of each part, and that of the parts of each exam, as far as they are finished.

        The answers, those of unfinished parts too, are written to OUT/answers/step-0000100.jsonl.

        Args:
            step: Of the training.
            answers: Tokens, to the first questions or to all.

        Raises:
            SinkError: They cannot be written.
        """
        scores: list[float] = []
        lines = []
        for question, tokens in zip(self.questions, answers, strict=False):
            text = self._chat.answer(tokens)
            scores.append(question.score(text))
            lines.append(_line(question, text, scores[-1]))
        self._write(step, b"".join(lines))
        return self._figures(scores)

    def _figures(self, scores: Sequence[float]) -> dict[str, float]:
        figures: dict[str, float] = {}
        begin = 0
        for exam, questions in groupby(self.questions, lambda question: question.exam):
            parts: list[float] = []
            whole = True
            for part, some in groupby(questions, lambda question: question.part):
                end = begin + sum(1 for _ in some)
                if whole := end <= len(scores):
                    figures[part] = fmean(scores[begin:end])
                    parts.append(figures[part])
                begin = end
            if whole:
                figures[exam] = fmean(parts)
        return figures

    def _write(self, step: int, data: bytes) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise SinkError(f"cannot make {self._folder}: {error.strerror}") from error
        write_whole(self._folder / f"step-{step:07}.jsonl", data)


def _line(question: Question, answer: str, score: float) -> bytes:
    line = {
        "exam": question.exam,
        "part": question.part,
        "id": question.id,
        "prompt_tokens": len(question.prompt.tokens),
        "answer": answer,
        "wanted": question.wanted,
        "grading": question.grading,
        "score": round(score, 4),
    }
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
