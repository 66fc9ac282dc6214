"""Does a context hold parts of an evaluation set? Runs of 13 words in common say so, as in GPT-3's report.

Case and punctuation do not count (see wordruns). A text that is shorter than such a run cannot be found.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import structlog

from streamsyn.errors import ConfigError
from streamsyn.scoring import evaltexts
from streamsyn.scoring.runset import GatheredRuns
from streamsyn.wordruns import split_words

log = structlog.get_logger()

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
        found = {pattern: evaltexts.find(pattern) for pattern in paths}
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
        texts = found = 0
        for text in evaltexts.texts(file):
            texts += 1
            if len(text) >= self._words:
                hashes = split_words(text).runs(self._words)
                runs.add(hashes, number)
                found += len(hashes)
        return texts, found

    def _check(self, pattern: str, counts: list[tuple[int, int]]) -> None:
        if not any(texts for texts, _ in counts):
            raise ConfigError(f"checks.eval_sets: there is no text in {pattern}")
        if not any(runs for _, runs in counts):
            raise ConfigError(
                f"checks.eval_sets: no text in {pattern} has checks.eval_ngram_words = {self._words} words"
            )
