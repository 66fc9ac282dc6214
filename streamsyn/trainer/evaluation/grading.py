"""From answers to figures, and to a file that a person can read."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean

import orjson

from streamsyn.errors import SinkError
from streamsyn.sink.rundir import write_whole
from streamsyn.trainer.evaluation.chat import Chat
from streamsyn.trainer.evaluation.question import Question

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
