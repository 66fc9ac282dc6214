"""Text similarity: MinHash signatures over word n-grams (shingles), and the word hashes below them.

`signatures` keeps 128 numbers per text. From two of them `similarity` estimates the Jaccard similarity of the
texts' 5-grams, with a standard error of at most 0.045. `split_words` hashes tens of megabytes a second.

Words are separated by spaces and punctuation, and compared in lower case, in compatibility form (NFKC) and
without apostrophes: "It's" and "ITS" are the same. In scripts without spaces each character is a word.
All hashes are the same on every machine and in every process.
"""

import signal
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import TypeAlias

import numpy
import rensa
from numpy.typing import NDArray

from streamsyn.words import IDEOGRAPHIC, RUN_TOGETHER

Hashes: TypeAlias = NDArray[numpy.uint64]
Letters: TypeAlias = NDArray[numpy.uint32]

SHINGLE_WORDS = 5
PERMUTATIONS = 128
BAND_ROWS = 6
"""Values per band, so 21 bands. Texts share a band with probability 0.998 at similarity 0.8, 3e-7 at 0.05."""
VERSION = f"{rensa.RMinHash.ALGORITHM_VERSION}.1"
"""Signatures of different versions cannot be compared."""

_SPACE, _LETTER, _UNSPACED_LETTER, _DROPPED = range(4)
_CLASSIFIED = 0x20000
"""Number of code points with a kind of their own. Those after it are rare ideographs."""
_SIMPLE = 0x2E80
"""Below it, the form of most characters does not depend on those next to them."""
_OTHER, _LEFT_OUT = 0xFFFF_FFFE, 0xFFFF_FFFF
_JAMO = (0x1100, 0x11FF)
"""Letters of Hangul, which combine to syllables."""
_CHUNK_CHARS = 2**14
"""Characters of texts that are split together."""
_APOSTROPHES = (0x27, 0x60, 0x2018, 0x2019, 0x2BC)
_PLACES = 64
"""Number of factors for the positions of letters in a word. Longer words use them again."""
_FACTOR = numpy.uint64(0x9E3779B97F4A7C15)


def mix_bits(numbers: Hashes) -> Hashes:
    """Mix the bits of each number, so that each depends on all (the finaliser of SplitMix64)."""
    numbers = (numbers ^ (numbers >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    result: Hashes = numbers ^ (numbers >> numpy.uint64(31))
    return result


_SEED = 20_250_215
_FACTORS: Hashes = mix_bits(numpy.arange(1, PERMUTATIONS + 1, dtype=numpy.uint64)) | numpy.uint64(1)


@dataclass(frozen=True, slots=True)
class Signature:
    """The MinHash signature of a text.

    Attributes:
        values: 128 numbers of 4 bytes, little-endian.
        keys: 21 numbers of 8 bytes, one a band. Texts without an equal one in the same place are not similar.
    """

    values: bytes
    keys: bytes

    @property
    def bands(self) -> tuple[int, ...]:
        """The keys as signed numbers."""
        return tuple(numpy.frombuffer(self.keys, numpy.int64).tolist())


def signature(text: str) -> Signature:
    """Return the signature of a text; see `signatures`."""
    return signatures([text])[0]


def signatures(texts: Sequence[str]) -> list[Signature]:
    """Return the signature of each text, in about 0.2 ms for 2,000 words. Short ones cost less together.

    A text of fewer than five words is one n-gram. All texts without words have the same signature.
    """
    if not texts:
        return []
    runs = [ngrams(hashes, min(SHINGLE_WORDS, len(hashes))) for hashes in _hashes_of_each(texts)]
    offsets = numpy.cumsum([0, *map(len, runs)]).tolist()
    rows = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        numpy.concatenate(runs), offsets, PERMUTATIONS, _SEED
    )
    values = numpy.array(rows.to_rows(), "<u4")
    bands = _band_keys(values, BAND_ROWS)
    return [Signature(row.tobytes(), keys.tobytes()) for row, keys in zip(values, bands, strict=True)]


def sign_from(connection: Connection) -> None:
    """Sign lists of texts from a pipe until its other end closes: the main function of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, OSError):
        while True:
            connection.send(signatures(connection.recv()))


def similarity(a: Signature, b: Signature) -> float:
    """Estimate the Jaccard similarity of two texts, from 0 to 1."""
    equal = numpy.frombuffer(a.values, "<u4") == numpy.frombuffer(b.values, "<u4")
    return int(numpy.count_nonzero(equal)) / PERMUTATIONS


def share_keys(signed: Sequence[Signature]) -> bool:
    """Whether any two of the signatures have an equal key, without which they are not similar."""
    keys = numpy.frombuffer(b"".join([one.keys for one in signed]), numpy.int64).reshape(len(signed), -1)
    keys = numpy.sort(keys, axis=0)
    return b"\1" in (keys[1:] == keys[:-1]).tobytes()  # faster than any()


def band_keys(values: bytes, rows: int) -> tuple[int, ...]:
    """Return one key for every `rows` values of a signature. A remainder at the end is not used."""
    return tuple(_band_keys(numpy.frombuffer(values, "<u4")[numpy.newaxis], rows)[0].tolist())


def _band_keys(values: NDArray[numpy.uint32], rows: int) -> NDArray[numpy.int64]:
    """Return the keys of several signatures; shape (signatures, bands)."""
    bands = PERMUTATIONS // rows
    numbers = values[:, : bands * rows].astype(numpy.uint64) * _FACTORS[: bands * rows]
    sums = numbers.reshape(len(values), bands, rows).sum(axis=2, dtype=numpy.uint64)
    return mix_bits(sums).view(numpy.int64)


@dataclass(frozen=True, slots=True)
class Words:
    """The words of a text.

    Attributes:
        letters: Code points of all words, with one 0 or more between them; shape (letters,).
        starts: Index in `letters` of the first letter of each word; shape (words,).
        hashes: Hash of each word; shape (words,).
    """

    letters: Letters
    starts: NDArray[numpy.intp]
    hashes: Hashes

    def __len__(self) -> int:
        return len(self.starts)

    def text(self, first: int, end: int) -> str:
        """Return the words from `first` up to, without, `end`, joined by spaces."""
        bounds = [*self.starts.tolist(), len(self.letters)][first : end + 1]
        cut = (self.letters[start:stop] for start, stop in pairwise(bounds))
        return " ".join(letters[letters != 0].astype("<u4").tobytes().decode("utf-32-le") for letters in cut)

    def ngrams(self, words: int) -> Hashes:
        """Return the hash of each n-gram of `words` words, in order; none if the text is shorter."""
        return ngrams(self.hashes, words)


def ngrams(hashes: Hashes, words: int) -> Hashes:
    """Return the hash of each n-gram of `words` words, given the hashes of a text's words in order."""
    count = len(hashes) - words + 1
    if count <= 0:
        return numpy.empty(0, numpy.uint64)
    numbers = hashes[:count].copy()
    for offset in range(1, words):
        numbers *= _FACTOR
        numbers += hashes[offset : offset + count]
    return numbers


def split_words(text: str) -> Words:
    """Split and hash the words of a text. Takes about 30 bytes of memory per character."""
    letters = _simple_letters(text)
    if letters is None:
        letters, starts = _letters_and_starts(text)
    else:
        letters, _ = _without_left_out(letters, [])
        starts = _starts(letters)
    return Words(letters, starts, _hashes(letters, starts))


def _hashes_of_each(texts: Sequence[str]) -> Iterator[Hashes]:
    """Yield the hashes of the words of each text."""
    first = 0
    while first < len(texts):
        end, chars = first + 1, len(texts[first])
        while end < len(texts) and (chars := chars + len(texts[end])) < _CHUNK_CHARS:
            end += 1
        yield from _hashes_of_chunk(texts[first:end])
        first = end


def _hashes_of_chunk(texts: Sequence[str]) -> Iterator[Hashes]:
    letters = _simple_letters("\n".join(texts)) if len(texts) > 1 else None
    if letters is None:
        yield from (split_words(text).hashes for text in texts)
        return
    letters, ends = _without_left_out(letters, [len(text) + 1 for text in texts[:-1]])
    starts = _starts(letters)
    yield from numpy.split(_hashes(letters, starts), numpy.searchsorted(starts, ends))


def _simple_letters(text: str) -> Letters | None:
    """Return the code point of each character in folded form, 0 for a separator, or `_LEFT_OUT`.

    None if a character has no simple form.
    """
    codes = numpy.frombuffer(text.encode("utf-32-le", "replace"), "<u4")
    letters: Letters = _simple_forms().take(codes, mode="clip")
    return None if (letters == _OTHER).any() else letters


def _without_left_out(letters: Letters, lengths: list[int]) -> tuple[Letters, NDArray[numpy.intp]]:
    """Return the letters that are not left out, and where the texts of these lengths end among them."""
    ends = numpy.cumsum(lengths, dtype=numpy.intp)
    if letters.max(initial=0) < _LEFT_OUT:
        return letters, ends
    kept = letters != _LEFT_OUT
    return letters[kept], numpy.cumsum(kept)[ends - 1]


def _starts(letters: Letters) -> NDArray[numpy.intp]:
    """Return where the words start, of letters with separators between all words."""
    is_start = letters != 0
    is_start[1:] &= letters[:-1] == 0
    return numpy.flatnonzero(is_start)


def _letters_and_starts(text: str) -> tuple[Letters, NDArray[numpy.intp]]:
    """Return the letters and the starts of words of any text."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    letters = numpy.frombuffer(folded.encode("utf-32-le", "replace"), "<u4").astype(numpy.uint32)
    kinds = _kinds().take(letters, mode="clip")
    kept = kinds != _DROPPED
    letters, kinds = letters[kept], kinds[kept]
    is_start = kinds != _SPACE
    letters[~is_start] = 0
    is_start[1:] &= (kinds[1:] == _UNSPACED_LETTER) | (kinds[:-1] != _LETTER)
    return letters, numpy.flatnonzero(is_start)


def _hashes(letters: Letters, starts: NDArray[numpy.intp]) -> Hashes:
    """Hash each word: the sum of its letters times factors for their positions, mixed."""
    if not len(starts):
        return numpy.empty(0, numpy.uint64)
    letters, starts = letters[starts[0] :], starts - starts[0]
    lengths = numpy.empty_like(starts)
    lengths[:-1] = starts[1:] - starts[:-1]
    lengths[-1] = len(letters) - starts[-1]
    places = numpy.arange(len(letters), dtype=numpy.int32)
    places -= numpy.repeat(starts.astype(numpy.int32), lengths)
    places &= _PLACES - 1
    terms = _factors().take(places)
    terms *= letters
    return mix_bits(numpy.add.reduceat(terms, starts))


@cache
def _factors() -> Hashes:
    """Return an odd factor for each position in a word."""
    return mix_bits(numpy.arange(1, _PLACES + 1, dtype=numpy.uint64) * _FACTOR) | numpy.uint64(1)


@cache
def _simple_forms() -> NDArray[numpy.uint32]:
    """Return the simple form of each character below `_SIMPLE`, by code point; the last one is `_OTHER`."""
    forms = numpy.array([*map(_simple_form, map(chr, range(_SIMPLE))), _OTHER], numpy.uint32)
    for first, last in (*RUN_TOGETHER, _JAMO):
        forms[first : last + 1] = _OTHER
    return forms


def _simple_form(character: str) -> int:
    if unicodedata.category(character)[0] == "M":  # it may combine with the character before it
        return _OTHER
    folded = unicodedata.normalize("NFKC", character).casefold()
    kinds = {_kind(one) for one in folded}
    if kinds == {_SPACE}:
        return 0
    if kinds == {_DROPPED}:
        return _LEFT_OUT
    return ord(folded) if len(folded) == 1 else _OTHER


def _kind(character: str) -> int:
    """Return the kind of a character, unless its script is written without spaces."""
    if ord(character) in _APOSTROPHES:
        return _DROPPED
    category = unicodedata.category(character)
    if category[0] in "PSZ" or category == "Cc":
        return _SPACE
    return _DROPPED if category == "Cf" else _LETTER  # soft hyphens and other invisible marks


@cache
def _kinds() -> NDArray[numpy.uint8]:
    """Return the kind of each character, indexed by code point."""
    kinds = numpy.full(_CLASSIFIED + 1, _LETTER, numpy.uint8)
    kinds[_CLASSIFIED] = _UNSPACED_LETTER
    kinds[:_CLASSIFIED] = [_kind(chr(code)) for code in range(_CLASSIFIED)]
    for first, last in (*RUN_TOGETHER, *IDEOGRAPHIC):
        unspaced = kinds[first : last + 1]
        unspaced[unspaced == _LETTER] = _UNSPACED_LETTER
    return kinds
