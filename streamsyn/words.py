"""What a word is, in every script: the one count for checks, windows, passages, scores and reports.

Words are separated by white space; punctuation belongs to the word that it is next to. Scripts without spaces
are divided further. Each Chinese character and each Japanese kana is a word. Thai, Lao, Khmer and Burmese
words cannot be found without a dictionary: there about every fourth letter begins a word, at places that
follow from the letters, so that equal passages are divided in the same way.

Whether a word begins at a character depends on it and the one before: a text can be divided piece by piece.
"""

import re
import sys
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:  # the first request of a run needs no numpy
    import numpy as np
    from numpy.typing import NDArray

IDEOGRAPHIC: Final = (
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),  # Katakana extensions
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
)
"""Ranges of code points in which each letter is a word. Those from 0x20000 on are ideographs too."""
RUN_TOGETHER: Final = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
)
"""Ranges of alphabets that are written without spaces between words."""
_STOPS: Final = ((0x3001, 0x303F), (0xFF01, 0xFF65))
"""Punctuation of ideographic scripts, among other characters."""
_CLASSIFIED: Final = 0x20000
_UTF_32: Final = "utf-32-le" if sys.byteorder == "little" else "utf-32-be"
_BEYOND_IDEOGRAPHS: Final = 0x40000
_SPACE, _OTHER, _LETTER, _STOP, _IDEOGRAPH, _RUN_TOGETHER = range(6)
_LETTERS_A_WORD: Final = 4
"""Letters of a word in an alphabet without spaces, roughly. A power of two."""
_SPREAD: Final = (0x9E3779B1, 0x85EBCA77)
"""Odd factors that spread pairs of letters evenly."""
_IS_ASCII_SPACE: Final = bytes(chr(code).isspace() for code in range(256))
_SPACE_CODE: Final = 0x20
_ASCII_SPACES: Final = bytes(_SPACE_CODE if chr(code).isspace() else code for code in range(256))
_LAST_SPACE: Final = 0x3000
_SHORT_CHARS: Final = 256
"""A text of fewer characters is faster split than made into an array."""
_RULER_CHARS: Final = 24
_BLANK_LINES: Final = re.compile(r"\n(?:[^\S\n]*\n){2,}")
_FILLER: Final = re.compile(rf"(\S)\1{{{_RULER_CHARS - 1},}}|{_BLANK_LINES.pattern}")
"""A character 24 times or more, such as a ruler; two blank lines or more."""
_ALL_EQUAL: Final = b"\1" * (_RULER_CHARS - 1)
"""Each character of a ruler equals the one before it."""
_FILLER_CHARS: Final = 6
"""Characters of a ruler that count as one word."""


def word_count(text: str) -> int:
    """The number of words of a text."""
    return len(text.split()) if text.isascii() else len(word_starts(text))


def words_of(text: str) -> list[str]:
    """The words of a text in order, without white space."""
    if text.isascii():
        return text.split()
    kinds, codes = _kinds_of(text)
    if kinds.max() < _STOP:  # spaces separate all its words
        return text.split()
    bounds = [*_starts(kinds, codes).tolist(), len(text)]
    return [text[start:end].rstrip() for start, end in pairwise(bounds)]


def words_and_filler(text: str) -> tuple[list[str], list[str]]:
    """The words of a text; and these words where what fills space without saying anything is repeated words.

    Each blank line after the first of several is a word, and so are six characters of a long run of one.
    """
    words = words_of(text)
    return words, _with_filler(text) if _has_filler(text) else words


def _has_filler(text: str) -> bool:
    """Whether `_FILLER` may match, in a tenth of the time that it takes to search for a run."""
    import numpy as np

    codes = np.frombuffer(text.encode("ascii"), np.uint8) if text.isascii() else _codes_of(text)
    return _ALL_EQUAL in (codes[1:] == codes[:-1]).tobytes() or _BLANK_LINES.search(text) is not None


def _with_filler(text: str) -> list[str]:
    found: list[str] = []
    end = 0
    for filler in _FILLER.finditer(text):
        found += words_of(text[end : filler.start()])
        is_blank = filler[1] is None
        times = filler[0].count("\n") - 2 if is_blank else len(filler[0]) // _FILLER_CHARS
        found += ["\n" if is_blank else filler[1]] * times
        end = filler.end()
    return found + words_of(text[end:])


def normalised(text: str) -> str:
    """The text for comparison: case-folded, with one space for all white space, and none around it."""
    folded = text.casefold()
    if len(folded) < _SHORT_CHARS:
        return " ".join(folded.split())
    import numpy as np

    if folded.isascii():
        letters = np.frombuffer(folded.encode("ascii").translate(_ASCII_SPACES), np.uint8)
        return letters[_is_kept(letters)].tobytes().decode("ascii").strip(" ")
    codes = _codes_of(folded)
    codes = np.where(_is_space().take(codes, mode="clip"), np.uint32(_SPACE_CODE), codes)
    kept = codes[_is_kept(codes)]
    return kept.tobytes().decode(_UTF_32, "surrogatepass").strip(" ")


def _is_kept(codes: "NDArray[Any]") -> "NDArray[np.bool_]":
    """Whether each character is kept: all but spaces that follow a space."""
    is_kept: NDArray[np.bool_] = codes != _SPACE_CODE
    is_kept[1:] |= is_kept[:-1].copy()
    return is_kept


def unspaced_letters(text: str) -> int:
    """The number of letters of scripts that are written without spaces."""
    if text.isascii():
        return 0
    import numpy as np

    kinds = _kinds_of(text)[0]
    return int(np.count_nonzero(kinds >= _IDEOGRAPH))


def word_starts(text: str) -> "NDArray[np.intp]":
    """The offset of each word, in characters; shape (words,).

    Takes about 40 ms for a million words in ASCII, a tenth of the time of lists of words.
    """
    import numpy as np

    if text.isascii():
        is_space = np.frombuffer(text.encode("ascii").translate(_IS_ASCII_SPACE), np.bool_)
        begins = ~is_space
        begins[1:] &= is_space[:-1]
        return np.flatnonzero(begins)
    return _starts(*_kinds_of(text))


def _starts(kinds: "NDArray[np.uint8]", codes: "NDArray[np.uint32]") -> "NDArray[np.intp]":
    import numpy as np

    begins = kinds != _SPACE
    now, before = kinds[1:], kinds[:-1]
    within = (now == _IDEOGRAPH) | ((now == _LETTER) & (before >= _STOP))
    if (is_run_together := now == _RUN_TOGETHER).any():
        pair = codes[1:] * np.uint32(_SPREAD[0]) + codes[:-1] * np.uint32(_SPREAD[1])
        is_cut = (pair >> np.uint32(16)) % np.uint32(_LETTERS_A_WORD) == 0
        other_script = (before >= _LETTER) & (before <= _IDEOGRAPH)
        within |= is_run_together & (is_cut | other_script)
    begins[1:] &= (before == _SPACE) | within
    return np.flatnonzero(begins)


def _kinds_of(text: str) -> "tuple[NDArray[np.uint8], NDArray[np.uint32]]":
    """The kind and the code point of each character."""
    codes = _codes_of(text)
    kinds = _kinds().take(codes, mode="clip")
    kinds[codes >= _BEYOND_IDEOGRAPHS] = _OTHER
    return kinds, codes


def _codes_of(text: str) -> "NDArray[np.uint32]":
    """The code point of each character."""
    import numpy as np

    return np.frombuffer(text.encode(_UTF_32, "surrogatepass"), np.uint32)


@cache
def _is_space() -> "NDArray[np.bool_]":
    """Whether a character is white space, by code point; the last one is that of all others."""
    import numpy as np

    return np.array([*(chr(code).isspace() for code in range(_LAST_SPACE + 1)), False])


@cache
def _kinds() -> "NDArray[np.uint8]":
    """The kind of each character, by code point; the last one is that of all rare ideographs."""
    import numpy as np

    kinds = np.full(_CLASSIFIED + 1, _OTHER, np.uint8)
    for code in range(_CLASSIFIED):
        character = chr(code)
        if character.isalnum():
            kinds[code] = _LETTER
        elif character.isspace():
            kinds[code] = _SPACE
    for ranges, before, after in (
        (IDEOGRAPHIC, _LETTER, _IDEOGRAPH),
        (RUN_TOGETHER, _LETTER, _RUN_TOGETHER),
        (_STOPS, _OTHER, _STOP),
    ):
        for first, last in ranges:
            some = kinds[first : last + 1]
            some[some == before] = after
    for first, last in RUN_TOGETHER:  # numbers are written as everywhere
        for code in range(first, last + 1):
            if chr(code).isdigit():
                kinds[code] = _LETTER
    kinds[_CLASSIFIED] = _IDEOGRAPH
    return kinds
