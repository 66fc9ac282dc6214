"""A question that the tuned model answers while it is trained, and how its answer is graded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from streamsyn.recipes.parse import without_thoughts
from streamsyn.scoring.metrics import measured
from streamsyn.trainer.stream.examples import Tokens

Grading: TypeAlias = Literal["recall", "f1", "rouge_l"]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What a rank needs to have a question answered.

    Attributes:
        tokens: int32 [n]: in the model's chat form, up to where it answers.
        max_new_tokens: The longest answer, its stop token with it.
        stop: Tokens that end an answer.
    """

    tokens: Tokens
    max_new_tokens: int
    stop: frozenset[int]


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
