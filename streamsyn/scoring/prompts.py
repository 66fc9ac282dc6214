"""What is asked of the model that scores: the instruction, with a context before it or without."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from streamsyn.records import digest
from streamsyn.scoring.metrics import Metric, metric_of
from streamsyn.templates import PromptTemplate, packaged, read

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
