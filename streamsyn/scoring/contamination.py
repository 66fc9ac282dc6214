"""A large set of 64-bit numbers that stand for runs of words, each with the file that it is from.

A sorted array: 8 bytes a number, 1 or 2 for the file, and 1 or 2 for a map of bits that spares most look-ups
of numbers that are not in it the way through memory. 40 million numbers take 0.4 GB, and twice that while
they are gathered.

The texts of evaluation sets: every string in any row of JSON lines, Parquet or text files.

Does a context hold parts of an evaluation set? Runs of 13 words in common say so, as in GPT-3's report.

Case and punctuation do not count (see wordruns). A text that is shorter than such a run cannot be found.
"""

import codecs
import glob
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy
import orjson
import structlog
from numpy.typing import NDArray

from streamsyn.errors import ConfigError
from streamsyn.io.lines import Line, split_lines
from streamsyn.seeds.files import BATCH_ROWS, COMPRESSED_SUFFIXES, LINE_SUFFIXES, plain_chunks
from streamsyn.shingles import Hashes, split_words

log = structlog.get_logger()

Places: TypeAlias = NDArray[numpy.intp]

CHUNK_RUNS = 2**21
_BITS_A_NUMBER = 8


class RunSet:
    """Tells which numbers are in the set. For any number of threads.

    Args:
        hashes: Rising, without repeats; evenly distributed.
        owners: For each the number of its file.
    """

    def __init__(self, hashes: Hashes, owners: NDArray[Any]) -> None:
        self._hashes = hashes
        self._owners = owners
        bits = max(6, (_BITS_A_NUMBER * len(hashes)).bit_length())
        self._shift = numpy.uint64(64 - bits)
        self._bits = numpy.zeros(2 ** (bits - 3), numpy.uint8)
        for start in range(0, len(hashes), CHUNK_RUNS):
            byte, bit = self._bit(hashes[start : start + CHUNK_RUNS])
            numpy.bitwise_or.at(self._bits, byte, bit)

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return self._hashes.nbytes + self._owners.nbytes + self._bits.nbytes

    def digest(self, key: bytes) -> str:
        """Stands for the numbers and `key`, not for the files."""
        numbers = self._hashes.astype("<u8", copy=False)
        return blake2b(numbers.data, key=key, digest_size=16).hexdigest()

    def find(self, runs: Hashes) -> tuple[Places, NDArray[Any]]:
        """At which places in `runs` there are numbers of the set, rising, and the files of these."""
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
    """Gathers numbers file by file; of repeated ones the first counts."""

    def __init__(self, files: int) -> None:
        self._hashes: Hashes = numpy.empty(0, numpy.uint64)
        self._owners: NDArray[Any] = numpy.empty(0, numpy.min_scalar_type(files))
        self._new: list[tuple[Hashes, int]] = []
        self._count = 0

    def add(self, hashes: Hashes, file: int) -> None:
        """Add the numbers of a text in the file with this number."""
        if len(hashes):
            self._new.append((hashes, file))
            self._count += len(hashes)
            # An eighth of what there is: the array is copied a few times, not once for each chunk.
            if self._count >= max(CHUNK_RUNS, len(self._hashes) // 8):
                self._merge()

    def finish(self) -> RunSet:
        """The set of all that were added."""
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


MAX_LINE_BYTES = 512 * 2**20
PIECE_CHARS = 2**20
OVERLAP_CHARS = 2**14
"""Pieces of a long text share so much that each run of words is whole in one of them."""


def find(pattern: str) -> list[Path]:
    """The files that a path, a directory (all below it) or a glob names, sorted.

    Raises:
        ConfigError: There are none.
    """
    path = Path(pattern)
    try:
        if pattern and path.exists():
            found = [path]
        else:
            found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
        files = list(dict.fromkeys(chain.from_iterable(map(_files_below, found))))
    except OSError as error:
        raise ConfigError(f"checks.eval_sets: {pattern} cannot be read: {error}") from error
    if files:
        return files
    if not found:
        raise ConfigError(f"checks.eval_sets: {pattern!r} does not exist")
    raise ConfigError(
        f"checks.eval_sets: {pattern} has no file of a known kind; there are .jsonl, .ndjson, .json, .txt "
        "(each also .gz or .zst) and .parquet"
    )


def texts(path: Path) -> Iterator[str]:
    """All strings in a file, long ones in pieces that overlap.

    Raises:
        ConfigError: It cannot be read to its end.
    """
    try:
        if path.suffix == ".parquet":
            rows: Iterable[Any] = _parquet_rows(path)
        elif _kind(path) == ".txt":
            yield from pieces(_decoded(path))
            return
        else:
            rows = _json_rows(path)
        for text in _strings(rows):
            yield from pieces([text])
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"checks.eval_sets: {path} cannot be read to its end: {error}") from error


def pieces(parts: Iterable[str]) -> Iterator[str]:
    """A text in pieces of a bounded size, each with the end of the one before it, cut between words."""
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
    """The last place between words in a stretch of a text; its end where there is none."""
    return next((at for at in range(end - 1, start, -1) if text[at].isspace()), end)


def _files_below(path: Path) -> Iterator[Path]:
    if path.is_dir():
        for child in sorted(path.iterdir()):
            yield from _files_below(child)
    elif path.is_file() and (path.suffix == ".parquet" or _kind(path)):
        yield path


def _kind(path: Path) -> str | None:
    """The suffix before that of the compression, if it is a known one."""
    for suffix in (*LINE_SUFFIXES, ".txt"):
        if any(path.name.endswith(suffix + compressed) for compressed in COMPRESSED_SUFFIXES):
            return suffix
    return None


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as raw:
        for chunk in plain_chunks(path.suffix, raw):
            yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _json_rows(path: Path) -> Iterator[Any]:
    with path.open("rb") as raw:
        for lines in split_lines(plain_chunks(path.suffix, raw), MAX_LINE_BYTES):
            for line in lines:
                if line.text is None:
                    raise ConfigError(
                        f"checks.eval_sets: {path}:{line.number} is longer than {MAX_LINE_BYTES} bytes"
                    )
                if not line.text.strip():
                    continue
                try:
                    row = orjson.loads(line.text)
                except orjson.JSONDecodeError as error:
                    yield _document(path, line, error)
                    return
                yield row


def _document(path: Path, line: Line, error: orjson.JSONDecodeError) -> Any:
    """A .json file of one document over many lines."""
    if line.number == 1 and _kind(path) == ".json":
        try:
            return orjson.loads("".join(_decoded(path)))
        except orjson.JSONDecodeError as failure:
            error = failure
    raise ConfigError(f"checks.eval_sets: {path}:{line.number} is no JSON: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise ConfigError(f"checks.eval_sets: {path} cannot be read as Parquet: {error}") from error


def _strings(rows: Iterable[Any]) -> Iterator[str]:
    """Every string in lists and objects of any depth, in their order; names of fields are none."""
    for row in rows:
        waiting = [row]
        while waiting:
            value = waiting.pop()
            if isinstance(value, str):
                yield value
            elif isinstance(value, dict):
                waiting.extend(reversed(value.values()))
            elif isinstance(value, list | tuple):
                waiting.extend(reversed(value))


SHOWN_WORDS = 40


@dataclass(frozen=True, slots=True)
class Overlap:
    """What a text shares with the sets.

    Attributes:
        ngrams: How many of its runs of words are in them.
        file: One that has the first of these.
        words: The first stretch of words in common, or its beginning; as they are compared.
    """

    ngrams: int
    file: str
    words: str


class EvalSets:
    """Runs of words in evaluation sets. Reading them blocks, some 5 seconds per 10 million runs.

    Args:
        paths: Files, directories, globs.
        ngram_words: Length of a run.

    Raises:
        ConfigError: One of them has no text that is so long, or cannot be read.

    Attributes:
        digest: Stands for the runs and their length, wherever the files lie.
    """

    def __init__(self, paths: Sequence[str], ngram_words: int) -> None:
        self._words = ngram_words
        started = time.monotonic()
        found = {pattern: find(pattern) for pattern in paths}
        self._files = list(dict.fromkeys(file for files in found.values() for file in files))
        gathered = GatheredRuns(len(self._files))
        counts = [self._read(file, number, gathered) for number, file in enumerate(self._files)]
        numbers = {file: number for number, file in enumerate(self._files)}
        for pattern, files in found.items():
            self._check(pattern, [counts[numbers[file]] for file in files])
        self._runs = gathered.finish()
        self.digest = self._runs.digest(b"%d" % ngram_words)
        log.info(
            "eval_sets.loaded",
            files=len(self._files),
            runs=len(self._runs),
            bytes=self._runs.nbytes,
            seconds=round(time.monotonic() - started, 2),
        )

    def __len__(self) -> int:
        """How many different runs there are."""
        return len(self._runs)

    def overlap(self, text: str) -> Overlap | None:
        """What a text shares with the sets; None if that is nothing. For any number of threads."""
        words = split_words(text)
        where, owners = self._runs.find(words.runs(self._words))
        if not len(where):
            return None
        first = int(where[0])
        gaps = numpy.flatnonzero(numpy.diff(where) != 1)
        last = int(where[gaps[0]]) if len(gaps) else int(where[-1])
        end = min(last + self._words, first + max(SHOWN_WORDS, self._words))
        return Overlap(len(where), str(self._files[owners[0]]), words.text(first, end))

    def _read(self, file: Path, number: int, runs: GatheredRuns) -> tuple[int, int]:
        """How many texts there are in a file, and how many runs."""
        count = found = 0
        for text in texts(file):
            count += 1
            if len(text) >= self._words:
                hashes = split_words(text).runs(self._words)
                runs.add(hashes, number)
                found += len(hashes)
        return count, found

    def _check(self, pattern: str, counts: list[tuple[int, int]]) -> None:
        if not any(texts for texts, _ in counts):
            raise ConfigError(f"checks.eval_sets: there is no text in {pattern}")
        if not any(runs for _, runs in counts):
            raise ConfigError(
                f"checks.eval_sets: no text in {pattern} has checks.eval_ngram_words = {self._words} words"
            )
