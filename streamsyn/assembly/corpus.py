"""A corpus of documents as distractors: read from files, cut into passages, held in bounded memory.

The texts of the passages are in a temporary file without a name, which goes with the process; an array holds
the offset at which each begins.
"""

import os
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from random import Random
from typing import Any, Final
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from streamsyn.assembly.window import Piece, shuffled
from streamsyn.config.sections import AssemblySection
from streamsyn.errors import ConfigError
from streamsyn.io.content import read_text
from streamsyn.io.inputs import TEXT_KINDS, decode_all, find_rows, is_text_file
from streamsyn.io.rows import ReadOptions
from streamsyn.words import word_count, word_starts

_KEY: Final = "assembly.corpus"
_TOKENS_A_WORD: Final = 1.3
"""Of English text, roughly: estimates the tokens of a passage, since no server has counted them."""
_BYTES_A_WORD: Final = 24
"""Memory that one word of a passage takes, with what is derived from it, roughly."""
_PARAGRAPH_END: Final = re.compile(r"\n[^\S\n]*\n")
_SENTENCE_END: Final = re.compile(
    r"[.!?\u2026]['\")\]\u2019\u201d]*(?=\s)|[\u3002\uff01\uff1f]['\")\]\u2019\u201d\u300d\u300f]*"
)
_END_SHARE: Final = 0.2
"""The last share of a passage in which the end of a paragraph or a sentence is looked for."""


class CorpusPassage(Piece):
    """A part of a document, without a place in the log."""

    def __init__(self, index: int, text: str, tokens: int) -> None:
        self.index = index
        self.text = text
        self.tokens = tokens

    @property
    def log_seq(self) -> None:
        return None

    @property
    def source_seed_id(self) -> None:
        return None


class Corpus:
    """All passages of a corpus. Any number of threads may read it.

    Args:
        documents: Each as pieces of text, so that none has to fit into memory.
        passage_words: Maximum words of a passage; longer documents are cut.
        cached_bytes: Memory for cached passages, roughly.
    """

    def __init__(self, documents: Iterable[Iterable[str]], passage_words: int, cached_bytes: int) -> None:
        self._ends = array("Q", [0])
        hashed = blake2b(digest_size=16)
        with tempfile.TemporaryFile() as file:
            for document in documents:
                for text in cut(document, passage_words):
                    data = text.encode()
                    file.write(data)
                    self._ends.append(self._ends[-1] + len(data))
                    hashed.update(b"%d:%b" % (len(data), data))
            file.flush()
            self._file = os.dup(file.fileno())
        finalize(self, os.close, self._file)
        self.digest = hashed.hexdigest()
        """Identifies all passages and their order."""
        self._cached = lru_cache(max(64, cached_bytes // (_BYTES_A_WORD * passage_words)))(self._read)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> CorpusPassage:
        return self._cached(index)

    def shuffled(self, rng: Random) -> Iterator[CorpusPassage]:
        """The passages in random order, drawn and read one by one as they are asked for."""
        return map(self.__getitem__, shuffled(range(len(self)), rng))

    def _read(self, index: int) -> CorpusPassage:
        begin, end = self._ends[index], self._ends[index + 1]
        text = os.pread(self._file, end - begin, begin).decode()
        return CorpusPassage(index, text, round(_TOKENS_A_WORD * word_count(text)))


def load_corpus(section: AssemblySection) -> Corpus:
    """The corpus that a configuration names.

    Raises:
        ConfigError: It names no files, or files that cannot be read or hold no text.
    """
    if not section.corpus:
        raise ConfigError(f"{_KEY} is empty, but assembly.distractors asks for a corpus; give files")
    documents = read_documents(section.corpus, section.corpus_field)
    try:
        corpus = Corpus(documents, section.corpus_words, section.window_bytes)
    except OSError as error:
        raise ConfigError(f"{_KEY}: {tempfile.gettempdir()} cannot hold the passages: {error}") from error
    if not len(corpus):
        raise ConfigError(f"{_KEY}: there is no text in {', '.join(section.corpus)}")
    return corpus


def read_documents(patterns: Sequence[str], field: str) -> Iterator[Iterable[str]]:
    """The documents in files and datasets, each as pieces of text, in a fixed order.

    Args:
        patterns: `assembly.corpus`.
        field: `assembly.corpus_field`: the field of a row that holds its text.

    Raises:
        ConfigError: A file is missing, cannot be read, or has a row without text; the message names it.
    """
    options = ReadOptions(columns={field: "assembly.corpus_field"}, key=_KEY)
    for pattern in patterns:
        for place in find_rows(pattern, _KEY, TEXT_KINDS).places:
            if is_text_file(place):
                yield read_text(place, options)
            else:
                yield from ([_text_of(row, field, where)] for where, row in decode_all(place, options))


def _text_of(row: Any, field: str, place: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ConfigError(f"{_KEY}: {place} has no text in {field!r}; assembly.corpus_field names the field")
    return text


def cut(chunks: Iterable[str], words: int) -> Iterator[str]:
    """Cut a document into passages, at the end of a paragraph or a sentence where one is near.

    Args:
        chunks: The document in pieces of text, which may end anywhere.
        words: Maximum words of a passage, at least 1.

    Returns:
        The passages in order, stripped; none is white space alone.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        begin = 0
        # A passage ends where the first word of the next one begins, even if the chunk breaks that word.
        starts = word_starts(rest)
        while len(starts) > words:
            end = _end(rest, starts, words)
            yield rest[begin:end].strip()
            begin = end
            starts = starts[int(np.searchsorted(starts, end)) :]
        rest = rest[begin:]
    if text := rest.strip():
        yield text


def _end(text: str, starts: NDArray[np.intp], words: int) -> int:
    """The end of a passage of up to `words` words; `starts` are those of the words from its beginning on."""
    latest = int(starts[words])
    earliest = int(starts[words - int(_END_SHARE * words) - 1])
    for pattern in (_PARAGRAPH_END, _SENTENCE_END):
        found = [match.end() for match in pattern.finditer(text, earliest, latest)]
        if found:
            return found[-1]
    return latest
