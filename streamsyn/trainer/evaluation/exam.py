"""Questions that the tuned model answers during training: grading, metrics, and the files OUT/answers/."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Literal, TypeAlias

import orjson

from streamsyn.errors import SinkError
from streamsyn.io.durable import write_whole
from streamsyn.scoring.answer_metrics import answer_score
from streamsyn.thoughts import without_thought
from streamsyn.trainer.commands import Prompt
from streamsyn.trainer.evaluation.answering import Chat

Grading: TypeAlias = Literal["recall", "f1", "rouge_l"]


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A prompt and its expected answer.

    Attributes:
        exam: The exam that it belongs to: `needles` or `longbench`.
        part: The part of the exam, which has a metric of its own, such as `needle_single_2048`.
        id: Unique within the part.
        prompt: The prompt, in tokens.
        wanted: With `recall`, texts that should all occur in the answer; otherwise alternative right answers.
        grading: The metric.
    """

    exam: str
    part: str
    id: str
    prompt: Prompt
    wanted: tuple[str, ...]
    grading: Grading

    def score(self, answer: str) -> float:
        """The score of an answer, from 0 to 1. Reasoning in front of the answer is left out."""
        answer = without_thought(answer)
        if self.grading == "recall":
            return recall(answer, self.wanted)
        metric = self.grading
        return max(answer_score(metric, answer, gold) for gold in self.wanted)


def recall(answer: str, wanted: Sequence[str]) -> float:
    """The share of the texts `wanted` that occur in the answer, ignoring case (RULER, arXiv 2404.06654)."""
    lowered = answer.lower()
    return sum(one.lower() in lowered for one in wanted) / len(wanted)


FOLDER = "answers"


class Exam:
    """All questions of a training.

    Args:
        questions: Grouped by exam, and within an exam by part.
        chat: Decodes answers.
        out: OUT.
    """

    def __init__(self, questions: Sequence[Question], chat: Chat, out: Path) -> None:
        self.questions = tuple(questions)
        self._chat = chat
        self._folder = out / FOLDER

    @property
    def names(self) -> frozenset[str]:
        """The names of the exams. A metric of that name means that the exam was finished."""
        return frozenset(question.exam for question in self.questions)

    def grade(self, step: int, answers: Sequence[Sequence[int]]) -> dict[str, float]:
        """Return the mean score of each finished part, and the mean over the parts of each finished exam.

        All answers are written to a file such as OUT/answers/step-0000100.jsonl.

        Args:
            step: Step of the training.
            answers: Tokens of the answers; fewer than there are questions if the exam was stopped.

        Raises:
            SinkError: The file cannot be written.
        """
        scores: list[float] = []
        lines = []
        for question, tokens in zip(self.questions, answers, strict=False):
            text = self._chat.answer(tokens)
            scores.append(question.score(text))
            lines.append(_line(question, text, scores[-1]))
        self._write(step, b"".join(lines))
        return self._metrics(scores)

    def _metrics(self, scores: Sequence[float]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        begin = 0
        for exam, questions in groupby(self.questions, lambda question: question.exam):
            parts: list[float] = []
            whole = True
            for part, some in groupby(questions, lambda question: question.part):
                end = begin + sum(1 for _ in some)
                if whole := end <= len(scores):
                    metrics[part] = fmean(scores[begin:end])
                    parts.append(metrics[part])
                begin = end
            if whole:
                metrics[exam] = fmean(parts)
        return metrics

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
