"""Passages of other people's documents, as distractors: any number of them, in bounded memory.

Their texts lie in a temporary file that has no name, so it goes when the process does; an array says
where each begins.
"""

import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import blake2b
from random import Random
from weakref import finalize

from streamsyn.assembly.cutting import cut
from streamsyn.assembly.passages import Piece, shuffled
from streamsyn.errors import ConfigError
from streamsyn.sections import AssemblySection

_TOKENS_A_WORD = 1.3
"""Of English text, about: what a passage counts for where there is no tokenizer."""
_BYTES_A_WORD = 24
"""What a word of a passage in memory takes, with what is worked out of it, about."""


class CorpusPassage(Piece):
    """A part of a document."""

    def __init__(self, index: int, text: str, tokens: int) -> None:
        self.index = index
        self.text = text
        self.tokens = tokens

    @property
    def log_seq(self) -> None:
        return None

    @property
    def origin(self) -> None:
        return None


class Corpus:
    """All passages of a corpus. Any number of threads may read it.

    Args:
        documents: Each as pieces of text, so that none has to fit into memory.
        passage_words: Longer documents are cut into passages of at most so many words.
        cached_bytes: Bounds the passages that are held in memory, about.
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
        """Stands for all passages and their order."""
        self._cached = lru_cache(max(64, cached_bytes // (_BYTES_A_WORD * passage_words)))(self._read)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> CorpusPassage:
        return self._cached(index)

    def shuffled(self, draw: Random) -> Iterator[CorpusPassage]:
        """The passages in random order, drawn and read one by one as they are asked for."""
        return (self[index] for index in shuffled(len(self), draw))

    def _read(self, index: int) -> CorpusPassage:
        begin, end = self._ends[index], self._ends[index + 1]
        text = os.pread(self._file, end - begin, begin).decode()
        return CorpusPassage(index, text, round(_TOKENS_A_WORD * len(text.split())))


def load_corpus(section: AssemblySection) -> Corpus:
    """The corpus that a configuration names.

    Raises:
        ConfigError: It names none, or one that cannot be read or holds no text.
    """
    from streamsyn.assembly.corpus_files import read_documents

    if not section.corpus:
        raise ConfigError("assembly.corpus: distractors of a corpus are wanted, and no files are given")
    documents = read_documents(section.corpus, section.corpus_field)
    try:
        corpus = Corpus(documents, section.corpus_words, section.window_bytes)
    except OSError as error:
        raise ConfigError(f"assembly.corpus: {tempfile.gettempdir()} cannot hold it: {error}") from error
    if not len(corpus):
        raise ConfigError(f"assembly.corpus: there is no text in {', '.join(section.corpus)}")
    return corpus
