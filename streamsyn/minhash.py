"""How alike two texts are, from 128 numbers of each: MinHash over their runs of five words.

Estimates the Jaccard similarity of the two sets of runs: the share of runs in either that is in both. The
standard error is at most 0.045. Pure, and the same on every machine.
"""

from dataclasses import dataclass

import numpy
import rensa

from streamsyn.wordruns import Hashes, mixed, split_words

SHINGLE_WORDS = 5
PERMUTATIONS = 128
BAND_ROWS = 6
"""Of two texts with similarity 0.8, 99.8 % share one of 21 bands; with 0.05, one in three million does."""
VERSION = f"{rensa.RMinHash.ALGORITHM_VERSION}.1"
"""Signatures of other versions cannot be compared with these."""

_SEED = 20_250_215
_FACTORS: Hashes = mixed(numpy.arange(1, PERMUTATIONS + 1, dtype=numpy.uint64)) | numpy.uint64(1)


@dataclass(frozen=True, slots=True)
class Signature:
    """What is kept of a text: its 128 numbers, 4 bytes each, and the keys under which to look it up."""

    values: bytes
    bands: tuple[int, ...]
    """Signed 64-bit numbers. Two texts that share none are not similar."""


def signature(text: str) -> Signature:
    """The signature of a text: some 0.2 ms for 2,000 words.

    Case and punctuation do not count (see wordruns). A text of fewer than five words is one run; all texts
    without words are alike.
    """
    words = split_words(text)
    runs = words.runs(min(SHINGLE_WORDS, len(words)))
    rows = rensa.RMinHash.digest_matrix_from_flat_token_hashes(runs, [0, len(runs)], PERMUTATIONS, _SEED)
    values = numpy.array(rows.to_rows()[0], "<u4").tobytes()
    return Signature(values, band_keys(values, BAND_ROWS))


def similarity(a: Signature, b: Signature) -> float:
    """The estimated Jaccard similarity of two texts, from 0 to 1."""
    equal = numpy.frombuffer(a.values, "<u4") == numpy.frombuffer(b.values, "<u4")
    return int(numpy.count_nonzero(equal)) / PERMUTATIONS


def band_keys(values: bytes, rows: int) -> tuple[int, ...]:
    """One key for every `rows` numbers of a signature; what is left over at the end is not used."""
    bands = PERMUTATIONS // rows
    numbers = numpy.frombuffer(values, "<u4", bands * rows).astype(numpy.uint64) * _FACTORS[: bands * rows]
    keys = mixed(numbers.reshape(bands, rows).sum(axis=1, dtype=numpy.uint64))
    return tuple(keys.view(numpy.int64).tolist())
