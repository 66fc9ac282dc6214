"""The checks of a context's text. Each has a reject reason of its own."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamsyn.config.sections import ChecksSection, RecipeSection
from streamsyn.records import Completion, RejectReason, Seed
from streamsyn.words import normalised, words_and_filler

if TYPE_CHECKING:  # the first request of a run needs no numpy
    from streamsyn.shingles import Hashes

_CANNOT = r"(?:can['\u2019]?t|cannot|can\s+not|unable|not\s+able|won['\u2019]?t)"
_WE_ARE = r"(?:i['\u2019]?m|i\s+am|we['\u2019]?re|we\s+are)"
_SORRY = rf"(?:{_WE_ARE}\s+(?:\w+\s+)?(?:sorry|afraid)|sorry|i\s+apologi[sz]e)"
_DECLINED = (
    r"(?:help\s+(?:you|with)|assist|write|provide|generate|create|comply|fulfil|answer|do\s+(?:this|that)"
    r"|produce|continue)"
)
_REFUSAL = re.compile(
    rf"""\A\W*(?:
      {_SORRY}\b[^.\n]{{0,60}}\b{_CANNOT}
    | (?:unfortunately,?\s+)?(?:i|we)\s+(?:am\s+|are\s+)?{_CANNOT}\s+(?:to\s+)?{_DECLINED}
    | as\s+an?\s+(?:ai|artificial\s+intelligence|(?:ai\s+|large\s+)?language\s+model)
      (?:\s+(?:model|assistant|system))?(?:,\s*|\s+)i\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)
# Each part stops at what ends it, so that texts of dashes or blank lines take linear time.
_QA_LABEL = re.compile(
    r"\A\W*+(?:question|instruction|query)[^\w:]*+:.{0,2000}?\n[^\w\n]*+answer[^\w:]*+:",
    re.IGNORECASE | re.DOTALL,
)
_RUN = 5
"""Length of the n-grams of `repetition`, in words."""
_PASTED_CHARS = 200
"""Maximum characters between a question and its answer for the two to count as pasted."""
_ECHO_CHARS = 60
"""Minimum characters of a prompt line that counts as an echo when an answer contains it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a text cannot be a context."""

    reason: RejectReason
    detail: str


class Checks:
    """The checks of one configuration (`[checks]`)."""

    def __init__(self, section: ChecksSection) -> None:
        self._section = section

    def measure(self, text: str) -> dict[str, Any]:
        """Return the statistics of a text that are stored in the context's `checks`."""
        return _figures(*words_and_filler(text))

    def failure(
        self, text: str, figures: dict[str, Any], seed: Seed, own_lines: Sequence[str]
    ) -> Failure | None:
        """Return the first check that `text` fails, or None.

        Args:
            text: The document.
            figures: What `measure` returned for it.
            seed: Its seed.
            own_lines: Normalised prompt lines that are the same for every seed.
        """
        return next(self._failures(text, normalised(text), figures, seed, own_lines), None)

    def judge(self, text: str, seed: Seed, own_lines: Sequence[str]) -> tuple[dict[str, Any], Failure | None]:
        """Return what `measure` and `failure` return, and divide the text into words only once."""
        words, with_filler = words_and_filler(text)
        plain = " ".join(words).casefold() if text.isascii() else normalised(text)
        figures = _figures(words, with_filler)
        return figures, next(self._failures(text, plain, figures, seed, own_lines), None)

    def part_failure(self, text: str, own_lines: Sequence[str], before: str) -> Failure | None:
        """Return why a section of a document cannot be used, or None.

        `before` is the previous section: a model in a loop repeats it.
        """
        return (
            self.refusal(text)
            or self._echo(normalised(text), own_lines)
            or self._repetition(repetition(words_and_filler(text)[1], words_and_filler(before)[1]))
        )

    def refusal(self, text: str) -> Failure | None:
        """Return a Failure if the text is empty or declines the request, or None."""
        if not text.strip():
            return Failure(RejectReason.EMPTY, "the answer holds no text")
        if self._section.refusal and _REFUSAL.match(text):
            return Failure(RejectReason.REFUSAL, _preview(text))
        return None

    def _failures(
        self, text: str, plain: str, figures: dict[str, Any], seed: Seed, own_lines: Sequence[str]
    ) -> Iterator[Failure]:
        section, words = self._section, figures["words"]
        if failure := self.refusal(text):
            yield failure
        if failure := self._echo(plain, own_lines):
            yield failure
        if section.qa_pasted and (problem := _pasted(text, plain, seed)):
            yield Failure(RejectReason.QA_PASTED, f"{problem}: {_preview(text)}")
        if words < section.min_words:
            yield Failure(
                RejectReason.TOO_SHORT, f"{words} words, fewer than checks.min_words = {section.min_words}"
            )
        if words > section.max_words:
            yield Failure(
                RejectReason.TOO_LONG, f"{words} words, more than checks.max_words = {section.max_words}"
            )
        if failure := self._repetition(figures["repetition"]):
            yield failure

    def _echo(self, plain: str, own_lines: Sequence[str]) -> Failure | None:
        if self._section.prompt_echo and (line := _echoed(plain, own_lines)):
            return Failure(RejectReason.PROMPT_ECHO, f"repeats our prompt: {line!r}")
        return None

    def _repetition(self, share: float) -> Failure | None:
        if share <= self._section.max_repetition:
            return None
        return Failure(
            RejectReason.REPETITION,
            f"{share:.0%} of its {_RUN}-word runs are repeated, more than "
            f"checks.max_repetition = {self._section.max_repetition:.0%}",
        )


def _figures(words: list[str], with_filler: list[str]) -> dict[str, Any]:
    return {"words": len(words), "repetition": round(repetition(with_filler), 4)}


def thinking_failure(completion: Completion, recipe: RecipeSection) -> Failure | None:
    """Return a Failure if the model thought and wrote no text, or None.

    Args:
        completion: The answer.
        recipe: Its settings limit the answer.
    """
    if not completion.is_only_thought:
        return None
    if completion.finish_reason != "length":
        return Failure(
            RejectReason.EMPTY,
            f"the answer is only a thought of {completion.thinking_tokens} tokens; if the model wrote text, "
            "too, the server's reasoning parser does not fit it",
        )
    limit = "recipe.section_tokens" if recipe.use == "sections" else "recipe.max_tokens"
    raised = 'set recipe.thinking = "on", which adds recipe.thinking_tokens'
    if recipe.thinking == "on":
        limit, raised = f"{limit} + recipe.thinking_tokens", "raise recipe.thinking_tokens"
    elif recipe.use != "sections":
        raised = "raise it"
    return Failure(
        RejectReason.STILL_THINKING,
        f"the model was still thinking at {limit} = {completion.completion_tokens}: {raised}, or turn its "
        'reasoning off with recipe.thinking = "off"',
    )


def repetition(words: list[str], before: list[str] | None = None) -> float:
    """Return the fraction of five-word runs that occurred earlier in the text, or in the text `before` it."""
    runs = len(words) - _RUN + 1
    if runs < 1:
        return 0.0
    sorted_runs = _sorted_runs(words)
    import numpy

    if before:
        new = len(
            numpy.setdiff1d(_different(sorted_runs), _different(_sorted_runs(before)), assume_unique=True)
        )
    else:
        new = 1 + int(numpy.count_nonzero(sorted_runs[1:] != sorted_runs[:-1]))
    return 1 - new / runs


def _sorted_runs(words: list[str]) -> "Hashes":
    """Return all runs as numbers, sorted: ten times as fast as a set of tuples for a long text."""
    import numpy

    from streamsyn.shingles import ngrams

    hashes = numpy.fromiter(map(hash, words), numpy.int64, len(words)).view(numpy.uint64)
    return numpy.sort(ngrams(hashes, _RUN))


def _different(sorted_runs: "Hashes") -> "Hashes":
    """Return each run once, in a tenth of the time of numpy.unique."""
    import numpy

    is_first = numpy.ones(len(sorted_runs), numpy.bool_)
    is_first[1:] = sorted_runs[1:] != sorted_runs[:-1]
    return sorted_runs[is_first]


def _echoed(plain: str, own_lines: Sequence[str]) -> str | None:
    for line in own_lines:
        if len(line) >= _ECHO_CHARS and line in plain:
            return _preview(line)
    return None


def _pasted(text: str, plain: str, seed: Seed) -> str | None:
    """Describe how the text is a copy of the question and answer instead of a document; None if it is not."""
    instruction, answer = normalised(seed.instruction), normalised(seed.answer)
    if _QA_LABEL.match(text):
        return "labelled question and answer"
    if answer not in plain:
        return None
    if _answered_at_once(plain, instruction, answer):
        return "the question followed by its answer"
    if 4 * len(answer) > 3 * len(plain):
        return "little more than the answer"
    return None


def _answered_at_once(plain: str, instruction: str, answer: str) -> bool:
    """Whether the answer starts within _PASTED_CHARS after the question, anywhere in the text."""
    whole = re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)")  # "no" does not match in "nobody"
    asked = plain.find(instruction)
    while asked >= 0:
        end = asked + len(instruction)
        found = whole.search(plain, end)
        if found is None:
            return False
        if found.start() - end <= _PASTED_CHARS:
            return True
        # Questions before this one are too far from the answer as well.
        asked = plain.find(instruction, found.start() - _PASTED_CHARS - len(instruction))
    return False


def _preview(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else f"{line[:157]}..."
