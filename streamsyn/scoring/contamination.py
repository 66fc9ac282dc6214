"""Whether a context contains parts of an evaluation set: runs of 13 words in common, as in GPT-3's report.

Case and punctuation do not count (see `shingles`). A text that is shorter than a run cannot be found.

A run is a 64-bit number, and all runs of the sets are one sorted array: 8 bytes a run, 1 or 2 for the number
of its file, and 1 or 2 for a bitmap that answers most look-ups of runs that are not in the sets without a
search. 40 million runs take 0.4 GB, and twice that while they are gathered.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, TypeAlias

import numpy
import structlog
from numpy.typing import NDArray

from streamsyn.errors import ConfigError
from streamsyn.io.content import read_text
from streamsyn.io.inputs import TEXT_KINDS, decode_all, find_rows, is_text_file
from streamsyn.io.places import Place
from streamsyn.io.rows import ReadOptions
from streamsyn.shingles import Hashes, split_words

log = structlog.get_logger()

Places: TypeAlias = NDArray[numpy.intp]

SHOWN_WORDS: Final = 40
MAX_LINE_BYTES: Final = 512 * 2**20
PIECE_CHARS: Final = 2**20
OVERLAP_CHARS: Final = 2**14
"""What neighbouring pieces of a long text have in common: each run of words is whole in one of them."""
CHUNK_RUNS: Final = 2**21
_BITS_A_RUN: Final = 8
_KEY: Final = "checks.eval_sets"


@dataclass(frozen=True, slots=True)
class Overlap:
    """What a text and the evaluation sets have in common.

    Attributes:
        ngrams: The number of runs of the text that are in the sets.
        file: The first file that contains the first of these runs.
        words: The first stretch of words in common, up to `SHOWN_WORDS` or the length of a run, as compared.
    """

    ngrams: int
    file: str
    words: str


class EvalSets:
    """The runs of words in evaluation sets. Reading them blocks, about 5 seconds per 10 million runs.

    Args:
        paths: Files, directories, globs, URLs, names on the hub.
        ngram_words: Words of a run.

    Raises:
        ConfigError: One of them cannot be read, or has no text of `ngram_words` words.

    Attributes:
        files: The files that were read.
        digest: Identifies the runs and their length, wherever the files are.
    """

    def __init__(self, paths: Sequence[str], ngram_words: int) -> None:
        self._words = ngram_words
        started = time.monotonic()
        found = {pattern: find_rows(pattern, _KEY, TEXT_KINDS).places for pattern in paths}
        self.files = list(dict.fromkeys(file for files in found.values() for file in files))
        gathered = GatheredRuns(len(self.files))
        counts = [self._read(file, number, gathered) for number, file in enumerate(self.files)]
        numbers = {file: number for number, file in enumerate(self.files)}
        for pattern, files in found.items():
            self._check(pattern, [counts[numbers[file]] for file in files])
        self._runs = gathered.finish()
        self.digest = self._runs.digest(b"%d" % ngram_words)
        log.info(
            "eval_sets.loaded",
            files=len(self.files),
            runs=len(self._runs),
            bytes=self._runs.nbytes,
            seconds=round(time.monotonic() - started, 2),
        )

    def __len__(self) -> int:
        """The number of different runs."""
        return len(self._runs)

    def overlap(self, text: str) -> Overlap | None:
        """What a text has in common with the sets, None if nothing. Any number of threads may call it."""
        words = split_words(text)
        where, owners = self._runs.find(words.ngrams(self._words))
        if not len(where):
            return None
        first = int(where[0])
        gaps = numpy.flatnonzero(numpy.diff(where) != 1)
        last = int(where[gaps[0]]) if len(gaps) else int(where[-1])
        end = min(last + self._words, first + max(SHOWN_WORDS, self._words))
        return Overlap(len(where), str(self.files[owners[0]]), words.text(first, end))

    def _read(self, file: Place, number: int, runs: "GatheredRuns") -> tuple[int, int]:
        """Add the runs of a file; returns the number of its texts and of its runs."""
        count = found = 0
        for text in texts(file):
            count += 1
            if len(text) >= self._words:
                hashes = split_words(text).ngrams(self._words)
                runs.add(hashes, number)
                found += len(hashes)
        return count, found

    def _check(self, pattern: str, counts: list[tuple[int, int]]) -> None:
        if not any(texts for texts, _ in counts):
            raise ConfigError(f"{_KEY}: there is no text in {pattern}")
        if not any(runs for _, runs in counts):
            raise ConfigError(
                f"{_KEY}: no text in {pattern} has checks.eval_ngram_words = {self._words} words"
            )


def texts(place: Place) -> Iterator[str]:
    """All strings in a file of rows, or the text of a text file; long ones in pieces that overlap.

    Raises:
        ConfigError: It cannot be read to its end, or a row of it cannot be decoded.
    """
    options = ReadOptions(MAX_LINE_BYTES, key=_KEY, documents=True, all_splits=True)
    if is_text_file(place):
        yield from pieces(read_text(place, options))
        return
    for _, row in decode_all(place, options):
        for text in _strings(row):
            yield from pieces([text])


def pieces(parts: Iterable[str]) -> Iterator[str]:
    """A text in pieces of a bounded size, cut between words; each repeats the end of the one before it."""
    held = ""
    fresh = False
    for part in parts:
        for start in range(0, len(part), PIECE_CHARS):
            held += part[start : start + PIECE_CHARS]
            fresh = True
            if len(held) > PIECE_CHARS:
                end = _cut(held, len(held) - OVERLAP_CHARS, len(held))
                yield held[:end]
                held = held[_cut(held, max(0, end - 2 * OVERLAP_CHARS), end - OVERLAP_CHARS) :]
                fresh = False
    if fresh:
        yield held


def _cut(text: str, start: int, end: int) -> int:
    """The last place between words in a stretch of a text; its end if there is none."""
    return next((at for at in range(end - 1, start, -1) if text[at].isspace()), end)


def _strings(row: Any) -> Iterator[str]:
    """Every string in lists and objects of any depth, in order; names of fields do not count."""
    waiting = [row]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting.extend(reversed(value.values()))
        elif isinstance(value, list | tuple):
            waiting.extend(reversed(value))


class RunSet:
    """An immutable set of runs, each with the number of a file. Any number of threads may use it.

    Args:
        hashes: Ascending, without duplicates; evenly distributed.
        owners: The number of the file of each.
    """

    def __init__(self, hashes: Hashes, owners: NDArray[Any]) -> None:
        self._hashes = hashes
        self._owners = owners
        bits = max(6, (_BITS_A_RUN * len(hashes)).bit_length())
        self._shift = numpy.uint64(64 - bits)
        self._bits = numpy.zeros(2 ** (bits - 3), numpy.uint8)
        for start in range(0, len(hashes), CHUNK_RUNS):
            byte, bit = self._bit(hashes[start : start + CHUNK_RUNS])
            numpy.bitwise_or.at(self._bits, byte, bit)

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def nbytes(self) -> int:
        """Its memory in bytes."""
        return self._hashes.nbytes + self._owners.nbytes + self._bits.nbytes

    def digest(self, key: bytes) -> str:
        """Identifies the runs and `key`; the files do not count."""
        numbers = self._hashes.astype("<u8", copy=False)
        return blake2b(numbers.data, key=key, digest_size=16).hexdigest()

    def find(self, runs: Hashes) -> tuple[Places, NDArray[Any]]:
        """The places in `runs`, ascending, of those that are in the set, and the numbers of their files."""
        byte, bit = self._bit(runs)
        where = numpy.flatnonzero(self._bits[byte] & bit)
        wanted = runs[where]
        places = numpy.searchsorted(self._hashes, wanted)
        found = self._hashes.take(places, mode="clip") == wanted
        return where[found], self._owners[places[found]]

    def _bit(self, hashes: Hashes) -> tuple[Places, NDArray[numpy.uint8]]:
        numbers = (hashes >> self._shift).astype(numpy.intp)
        return numbers >> 3, numpy.left_shift(1, numbers & 7).astype(numpy.uint8)


class GatheredRuns:
    """Gathers runs file by file; a run belongs to the first file that has it."""

    def __init__(self, files: int) -> None:
        self._hashes: Hashes = numpy.empty(0, numpy.uint64)
        self._owners: NDArray[Any] = numpy.empty(0, numpy.min_scalar_type(files))
        self._new: list[tuple[Hashes, int]] = []
        self._count = 0

    def add(self, hashes: Hashes, file: int) -> None:
        """Add the runs of one text of a file."""
        if len(hashes):
            self._new.append((hashes, file))
            self._count += len(hashes)
            # Waiting for an eighth of the array means that it is copied a few times, not once per chunk.
            if self._count >= max(CHUNK_RUNS, len(self._hashes) // 8):
                self._merge()

    def finish(self) -> RunSet:
        """The set of all runs that were added."""
        if self._new:
            self._merge()
        return RunSet(self._hashes, self._owners)

    def _merge(self) -> None:
        lengths = [len(hashes) for hashes, _ in self._new]
        files = numpy.array([file for _, file in self._new], self._owners.dtype)
        new, first = numpy.unique(numpy.concatenate(list(self._taken())), return_index=True)
        owners = numpy.repeat(files, lengths)[first]
        del first
        if not len(self._hashes):
            self._hashes, self._owners = new, owners
            return
        places = numpy.searchsorted(self._hashes, new)
        is_new = self._hashes.take(places, mode="clip") != new
        places = places[is_new]
        self._hashes = numpy.insert(self._hashes, places, new[is_new])
        self._owners = numpy.insert(self._owners, places, owners[is_new])

    def _taken(self) -> Iterator[Hashes]:
        new, self._new, self._count = self._new, [], 0
        return (hashes for hashes, _ in new)
