"""What a context must satisfy. Each check measures a text and names its own reason to reject."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from streamsyn.config.sections import ChecksSection
from streamsyn.records import RejectReason, Seed

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
_QA_LABEL = re.compile(
    r"\A\W*(?:question|instruction|query)\W*:.{0,2000}?\n\W*answer\W*:", re.IGNORECASE | re.DOTALL
)
_RUN = 5
"""Words in a run, for repetition."""
_NEAR = 200
"""Characters between a question and its answer within which they count as pasted."""
_ECHO_CHARS = 60
"""A line of our prompt at least this long, found in an answer, is an echo."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a text is not fit to be a context."""

    reason: RejectReason
    detail: str


class Checks:
    """The checks of one configuration."""

    def __init__(self, section: ChecksSection) -> None:
        self._section = section

    def measure(self, text: str) -> dict[str, Any]:
        """Figures of a text that stay with its context."""
        words = text.split()
        return {"words": len(words), "repetition": round(repetition(words), 4)}

    def failure(
        self, text: str, figures: dict[str, Any], seed: Seed, own_lines: Sequence[str]
    ) -> Failure | None:
        """The first check that `text` fails; None when it passes them all.

        `own_lines` are lines of our prompt that are the same for every seed, normalised.
        """
        return next(self._failures(text, figures, seed, own_lines), None)

    def part_failure(self, text: str, own_lines: Sequence[str], before: str) -> Failure | None:
        """What makes one section of a document unfit to be gone on from; None when nothing does.

        `before` is the section before it: a model that has begun to loop says the same again.
        """
        return (
            self.refusal(text)
            or self._echo(normalised(text), own_lines)
            or self._repetition(repetition(text.split(), before.split()))
        )

    def refusal(self, text: str) -> Failure | None:
        """Whether there is no text, or one that declines."""
        if not text.strip():
            return Failure(RejectReason.EMPTY, "the answer holds no text")
        if self._section.refusal and _REFUSAL.match(text):
            return Failure(RejectReason.REFUSAL, _shown(text))
        return None

    def _failures(
        self, text: str, figures: dict[str, Any], seed: Seed, own_lines: Sequence[str]
    ) -> Iterator[Failure]:
        section, words = self._section, figures["words"]
        if failure := self.refusal(text):
            yield failure
        plain = normalised(text)
        if failure := self._echo(plain, own_lines):
            yield failure
        if section.qa_pasted and (what := _pasted(text, plain, seed)):
            yield Failure(RejectReason.QA_PASTED, f"{what}: {_shown(text)}")
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
            f"{share:.0%} of its {_RUN}-word runs stand in it before, more than "
            f"checks.max_repetition = {self._section.max_repetition:.0%}",
        )


def repetition(words: list[str], before: list[str] | None = None) -> float:
    """Share of runs of five words that have stood in the text before, or in the text `before` it."""
    runs = len(words) - _RUN + 1
    if runs < 1:
        return 0.0
    return 1 - len(_runs(words) - _runs(before or [])) / runs


def _runs(words: list[str]) -> set[tuple[str, ...]]:
    return set(zip(*(words[start:] for start in range(_RUN)), strict=False))


def normalised(text: str) -> str:
    """`text` for comparing: case and white space do not count."""
    return " ".join(text.casefold().split())


def _echoed(plain: str, own_lines: Sequence[str]) -> str | None:
    return next((_shown(line) for line in own_lines if len(line) >= _ECHO_CHARS and line in plain), None)


def _pasted(text: str, plain: str, seed: Seed) -> str | None:
    """What of the pair stands in place of a document, if anything does."""
    instruction, answer = normalised(seed.instruction), normalised(seed.answer)
    if _QA_LABEL.match(text):
        return "labelled question and answer"
    asked = plain.find(instruction)
    while asked >= 0:
        behind = asked + len(instruction)
        near = plain[behind : behind + len(answer) + _NEAR]
        if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", near):  # "no" does not stand in "nobody"
            return "the question with its answer behind it"
        asked = plain.find(instruction, asked + 1)
    if answer in plain and 4 * len(answer) > 3 * len(plain):
        return "hardly more than the answer"
    return None


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else f"{line[:157]}..."
