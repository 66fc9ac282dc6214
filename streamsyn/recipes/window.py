"""A part of a long document, from a place that is drawn; its words and white space stay as they are."""

import re
import sys
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

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


def draw_window(document: str, words: int | None, draw: Random) -> Window:
    """So many words of a document; all of it when it has no more, or without a number.

    It begins where a paragraph does, else where a sentence does, that is near to the place drawn.
    """
    starts = word_starts(document)
    of = len(starts)
    if words is None or of <= words:
        return Window(document.strip(), 0, of, of)
    first = _start_near(document, starts, draw.randint(0, of - words), words)
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
