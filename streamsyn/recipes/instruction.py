"""The recipe `instruction`: the seed is a document, and the LLM writes a question and its answer.

This is the baseline that context synthesis is measured against in arXiv 2502.15592, section 5: there the
contexts stay, and an LLM writes instruction and answer. Published code takes a window of 3,000 words from a
random place of a longer document.
"""

import re
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from streamsyn.config.sections import ChecksSection, RecipeSection
from streamsyn.recipes.checks import Checks, Failure
from streamsyn.recipes.context import SingleRequest, joined
from streamsyn.recipes.parsing import WrittenPair, document_text, first_pair
from streamsyn.recipes.prompt import EXAMPLE, group_of
from streamsyn.recipes.recipe import RejectedDraft, Steps
from streamsyn.records import Completion, Document, Draft, RejectReason, Request, Seed, digest
from streamsyn.words import normalised, word_count, word_starts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SENTENCE_END = re.compile(r"[.!?\u2026\u3002\uff01\uff1f]['\")\]\u2019\u201d\u300d\u300f]*\Z")
_NEAR = 100
"""Maximum words between the place drawn and the start of the window, at most half the window."""
_EXAMPLE: dict[str, Any] = {"context": "c", "task": EXAMPLE["task"], "metadata": EXAMPLE["metadata"]}
_PLACEHOLDERS = {
    "question",
    "answer",
    "instruction",
    "the question",
    "the answer",
    "your question",
    "your answer",
}
_PREVIEW_CHARS = 120
"""Characters of an answer in the detail of a reject."""


@dataclass(frozen=True, slots=True)
class Window:
    """A contiguous part of a document, in words.

    Attributes:
        text: The text, with its white space unchanged.
        first: Number of its first word, from 0.
        words: Number of its words.
        of: Number of words of the document.
    """

    text: str
    first: int
    words: int
    of: int

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole document."""
        return self.words == self.of

    def figures(self) -> list[int]:
        """Return the three numbers for the context's checks."""
        return [self.first, self.words, self.of]


class InstructionRecipe:
    """Asks for a question about a document and its answer, and again if the answer contains no valid pair.

    `checks.min_words` applies to the document, `checks.max_words` to question and answer.

    Raises:
        ConfigError: A template is invalid.
    """

    takes_documents = True

    def __init__(self, recipe: RecipeSection, checks: ChecksSection) -> None:
        self._recipe = recipe
        self._section = checks
        self._checks = Checks(checks)
        self._single = SingleRequest(recipe, "instruction", _EXAMPLE)

    def steps(self, draft: Draft) -> Steps:
        """Ask up to `recipe.tries` times for a pair that passes the checks.

        Raises:
            RejectedDraft: The document is too short, or all tries failed.
        """
        window = self.window(draft)
        if window.words < self._section.min_words:
            least = f"fewer than checks.min_words = {self._section.min_words}"
            raise RejectedDraft(RejectReason.TOO_SHORT, f"the document has {window.words} words, {least}")
        own_lines = self._single.prompt_of(draft.seed).own_lines

        def judge(completions: list[Completion]) -> Document | Failure:
            text, last = joined(completions), completions[-1]
            pair = first_pair(text)
            if pair is None:
                plain = document_text(text)
                return self._checks.refusal(plain) or _no_pair(
                    f"no question with an answer in {_preview(plain)}"
                )
            is_cut = last.finish_reason == "length" and not pair.is_whole
            failure = self._failure(pair, own_lines)
            if failure := failure or (self._single.cut_failure(last) if is_cut else None):
                return failure
            flags = ["truncated"] if is_cut else []
            # An estimate: the document and the rest of the prompt, since no server counts the document alone.
            tokens = completions[0].prompt_tokens
            checks = {"words": window.words, "tokens": tokens, "window": window.figures(), "flags": flags}
            return Document(window.text, checks, completions, pair.question, pair.answer)

        return (yield from self._single.ask(self._request(draft.seed, window), judge, _holds_a_whole_pair))

    def window(self, draft: Draft) -> Window:
        """Return the part of the document for a draft, the same in every run."""
        rng = Random(digest(draft.key, "window"))
        return draw_window(draft.seed.context, self._recipe.window_words, rng)

    def request(self, draft: Draft) -> Request:
        """Return the request of each try."""
        return self._request(draft.seed, self.window(draft))

    def group(self, seed: Seed) -> str:
        """Return the key of the template's block `group` for the first draft of a document."""

        def first() -> Request:
            return self._single.first_request(seed, _variables(seed, self.window(Draft(seed))))

        return group_of(self._single.prompt_of(seed), first)

    def outlook(self) -> str:
        """Return "": one request is all."""
        return ""

    def fingerprint(self) -> dict[str, str]:
        """Return a digest of the prompt, since the packaged one may change between versions."""
        return self._single.fingerprint()

    def _request(self, seed: Seed, window: Window) -> Request:
        # Drafts share their text only if each has the whole document.
        drafts_alike = self._recipe.contexts_per_seed > 1 and window.is_whole
        return self._single.request(seed, _variables(seed, window), drafts_alike=drafts_alike)

    def _failure(self, pair: WrittenPair, own_lines: tuple[str, ...]) -> Failure | None:
        """Return the first check that a pair fails, or None."""
        for name, text in (("question", pair.question), ("answer", pair.answer)):
            if not text:
                return Failure(RejectReason.EMPTY, f"the {name} is empty")
            if failure := self._checks.part_failure(text, own_lines, ""):
                return Failure(failure.reason, f"the {name}: {failure.detail}")
            if normalised(text).strip(" .:<>[]()*_?") in {"", *_PLACEHOLDERS}:
                return _no_pair(f"the {name} says nothing: {_preview(text)}")
            if (words := word_count(text)) > self._section.max_words:
                most = f"more than checks.max_words = {self._section.max_words}"
                return Failure(RejectReason.TOO_LONG, f"the {name} has {words} words, {most}")
        return None


def _variables(seed: Seed, window: Window) -> dict[str, Any]:
    return {"context": window.text, "task": seed.task, "metadata": seed.metadata}


def draw_window(document: str, words: int | None, rng: Random) -> Window:
    """Return `words` words from a random place; the whole document if it is shorter or `words` is None.

    It starts with a paragraph, or else a sentence, near the place drawn.
    """
    starts = word_starts(document)
    of = len(starts)
    if words is None or of <= words:
        return Window(document.strip(), 0, of, of)
    first = _start_near(document, starts, rng.randint(0, of - words), words)
    end = starts[first + words] if first + words < of else len(document)
    return Window(document[starts[first] : end].rstrip(), first, words, of)


def _start_near(document: str, starts: "NDArray[np.intp]", drawn: int, words: int) -> int:
    """Return the number of the word that the window starts with, near the one drawn."""
    reach = min(_NEAR, words // 2)
    paragraphs, sentences = [], []
    for number in range(max(0, drawn - reach), min(len(starts) - words, drawn + reach) + 1):
        before = document[starts[number - 1] : starts[number]] if number else "\n\n"
        if before.count("\n") > 1:
            paragraphs.append(number)
        elif _SENTENCE_END.search(before.rstrip()):
            sentences.append(number)
    return min(paragraphs or sentences or [drawn], key=lambda number: abs(number - drawn))


def _holds_a_whole_pair(text: str) -> bool:
    pair = first_pair(text)
    return pair is not None and pair.is_whole


def _no_pair(detail: str) -> Failure:
    return Failure(RejectReason.NO_PAIR, detail)


def _preview(text: str) -> str:
    line = " ".join(text[: 4 * _PREVIEW_CHARS].split())
    return repr(line) if len(line) <= _PREVIEW_CHARS else f"{line[:_PREVIEW_CHARS]!r}..."
