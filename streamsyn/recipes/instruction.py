"""A part of a long document, from a place that is drawn; its words and white space stay as they are.

The recipe `instruction`: a document is given, and its question and answer are written.

It is the baseline that context synthesis is measured against in arXiv 2502.15592, section 5: there the
contexts stay, and an LLM writes instruction and answer; published code takes a window of 3,000 words, from a
random place, of a document that is longer.
"""

import re
import sys
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamsyn.config.sections import ChecksSection, RecipeSection
from streamsyn.recipes.checks import Checks, Failure, normalised
from streamsyn.recipes.parsing import Pair, document_text, first_pair
from streamsyn.recipes.prompt import EXAMPLE, Opening, group_of
from streamsyn.recipes.recipe import RejectedDraft, Steps
from streamsyn.recipes.single_request import Asking, joined
from streamsyn.records import Completion, Document, Draft, RejectReason, Request, Seed, digest

_SENTENCE_END = re.compile(r"[.!?\u2026]['\")\]\u2019\u201d]*\Z")
_NEAR = 100
"""A paragraph or sentence that begins so many words from the place drawn is near, or half as far as
the window is long, where that is less."""
_BEYOND = 0x3001
"""No character from here on is white space."""
_IS_SPACE = np.array([chr(code).isspace() for code in range(_BEYOND)] + [False])
_IS_ASCII_SPACE = bytes(chr(code).isspace() for code in range(256))


@dataclass(frozen=True, slots=True)
class Window:
    """Words of a document, in one piece.

    Attributes:
        text: Them, with the white space between them.
        first: Number of the first one, from 0. Words are what white space separates.
        words: How many there are.
        of: How many the document has.
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
        """As they stand in a context's checks."""
        return [self.first, self.words, self.of]


def draw_window(document: str, words: int | None, rng: Random) -> Window:
    """So many words of a document; all of it when it has no more, or without a number.

    It begins where a paragraph does, else where a sentence does, that is near to the place drawn.
    """
    starts = word_starts(document)
    of = len(starts)
    if words is None or of <= words:
        return Window(document.strip(), 0, of, of)
    first = _start_near(document, starts, rng.randint(0, of - words), words)
    end = starts[first + words] if first + words < of else len(document)
    return Window(document[starts[first] : end].rstrip(), first, words, of)


def word_starts(text: str) -> NDArray[np.intp]:
    """Where the words of a text begin, as `str.split` would cut it; shape (words,), places in characters.

    Lists of words would take ten times as long: here it is some 40 ms for a million words in ASCII.
    """
    if text.isascii():
        is_space = np.frombuffer(text.encode("ascii").translate(_IS_ASCII_SPACE), np.bool_)
    else:
        order = "le" if sys.byteorder == "little" else "be"
        codes = np.frombuffer(text.encode(f"utf-32-{order}", "surrogatepass"), np.uint32)
        is_space = _IS_SPACE[np.minimum(codes, _BEYOND)]
    begins = ~is_space
    begins[1:] &= is_space[:-1]
    return np.flatnonzero(begins)


def _start_near(document: str, starts: NDArray[np.intp], drawn: int, words: int) -> int:
    """The number of the word to begin with, so near to the one drawn that the window still fits."""
    reach = min(_NEAR, words // 2)
    paragraphs, sentences = [], []
    for number in range(max(0, drawn - reach), min(len(starts) - words, drawn + reach) + 1):
        before = document[starts[number - 1] : starts[number]] if number else "\n\n"
        if before.count("\n") > 1:
            paragraphs.append(number)
        elif _SENTENCE_END.search(before.rstrip()):
            sentences.append(number)
    return min(paragraphs or sentences or [drawn], key=lambda number: abs(number - drawn))


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
_SHOWN = 120


class InstructionRecipe:
    """Asks for a question on a document and its answer, and afresh when there is no pair in what comes.

    `checks.min_words` holds for the document, `checks.max_words` for question and answer.

    Raises:
        ConfigError: A template cannot be used.
    """

    takes_documents = True

    def __init__(self, recipe: RecipeSection, checks: ChecksSection) -> None:
        self._recipe = recipe
        self._section = checks
        self._checks = Checks(checks)
        self._asking = Asking(recipe, "instruction", _EXAMPLE)

    def steps(self, draft: Draft) -> Steps:
        """Ask up to `recipe.tries` times for a pair that passes the checks.

        Raises:
            RejectedDraft: The document is too short, or no answer was good enough.
        """
        window = self.window(draft)
        if window.words < self._section.min_words:
            least = f"fewer than checks.min_words = {self._section.min_words}"
            raise RejectedDraft(RejectReason.TOO_SHORT, f"the document has {window.words} words, {least}")
        own_lines = self._asking.prompt_of(draft.seed).own_lines

        def judge(completions: list[Completion]) -> Document | Failure:
            text, last = joined(completions), completions[-1]
            pair = first_pair(text)
            if pair is None:
                plain = document_text(text)
                return self._checks.refusal(plain) or _no_pair(
                    f"no question with an answer in {_shown(plain)}"
                )
            is_cut = last.finish_reason == "length" and not pair.is_whole
            failure = self._failure(pair, own_lines)
            if failure := failure or (self._asking.cut_failure(last) if is_cut else None):
                return failure
            flags = ["truncated"] if is_cut else []
            # The document's length, but for what the prompt adds: nobody counts the document alone.
            tokens = completions[0].prompt_tokens
            checks = {"words": window.words, "tokens": tokens, "window": window.figures(), "flags": flags}
            return Document(window.text, checks, completions, pair.question, pair.answer)

        return (yield from self._asking.ask(self._request(draft.seed, window), judge, _holds_a_whole_pair))

    def window(self, draft: Draft) -> Window:
        """The part of the document that a draft is about, the same in every run."""
        rng = Random(digest(draft.key, "window"))
        return draw_window(draft.seed.context, self._recipe.window_words, rng)

    def request(self, draft: Draft) -> Request:
        """The question asked first, and afresh after a failed check."""
        return self._request(draft.seed, self.window(draft))

    def group(self, seed: Seed) -> str:
        """Key of what the template's block `group` makes of a document's first draft."""

        def opening_of(seed: Seed) -> Opening:
            return self._opening(seed, self.window(Draft(seed)))

        return group_of(self._asking.prompt_of(seed), seed, opening_of)

    def outlook(self) -> str:
        """Nothing follows a good answer."""
        return ""

    def fingerprint(self) -> dict[str, str]:
        """A digest of the prompt, which may be the packaged one of another version."""
        return self._asking.fingerprint()

    def _request(self, seed: Seed, window: Window) -> Request:
        # Drafts share the text they are about only where each is about all of it.
        asks_alike = self._recipe.contexts_per_seed > 1 and window.is_whole
        return self._asking.request(self._opening(seed, window), seed, asks_alike=asks_alike)

    def _opening(self, seed: Seed, window: Window) -> Opening:
        variables = {"context": window.text, "task": seed.task, "metadata": seed.metadata}
        return self._asking.opening(seed, variables)

    def _failure(self, pair: Pair, own_lines: tuple[str, ...]) -> Failure | None:
        """The first check that a pair fails; None when it passes them all."""
        for name, text in (("question", pair.question), ("answer", pair.answer)):
            if not text:
                return Failure(RejectReason.EMPTY, f"the {name} is empty")
            if failure := self._checks.part_failure(text, own_lines, ""):
                return Failure(failure.reason, f"the {name}: {failure.detail}")
            if normalised(text).strip(" .:<>[]()*_?") in {"", *_PLACEHOLDERS}:
                return _no_pair(f"the {name} says nothing: {_shown(text)}")
            if (words := len(text.split())) > self._section.max_words:
                most = f"more than checks.max_words = {self._section.max_words}"
                return Failure(RejectReason.TOO_LONG, f"the {name} has {words} words, {most}")
        return None


def _holds_a_whole_pair(text: str) -> bool:
    pair = first_pair(text)
    return pair is not None and pair.is_whole


def _no_pair(detail: str) -> Failure:
    return Failure(RejectReason.NO_PAIR, detail)


def _shown(text: str) -> str:
    line = " ".join(text[: 4 * _SHOWN].split())
    return repr(line) if len(line) <= _SHOWN else f"{line[:_SHOWN]!r}..."
