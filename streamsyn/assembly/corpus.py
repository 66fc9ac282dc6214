"""Long documents into passages, at the end of a paragraph or a sentence where one is near.

Files of a corpus: text, JSON lines (plain, .gz, .zst), Parquet.

Passages of other people's documents, as distractors: any number of them, in bounded memory.

Their texts lie in a temporary file that has no name, so it goes when the process does; an array says
where each begins.
"""

import codecs
import glob
import gzip
import os
import re
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from random import Random
from typing import IO, Any
from weakref import finalize

import orjson
import pyarrow
import pyarrow.parquet
import zstandard

from streamsyn.assembly.window import Piece, shuffled
from streamsyn.config.sections import AssemblySection
from streamsyn.errors import ConfigError

_WORD = re.compile(r"\S+")
_PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n")
_SENTENCE_END = re.compile(r"[.!?\u2026\u3002]['\")\]\u2019\u201d]*(?=\s)")
_NEAR = 0.2
"""The last part of a passage in which an end is looked for."""


def cut(chunks: Iterable[str], words: int) -> Iterator[str]:
    """Passages of at most so many words, in order, stripped; none of white space alone.

    Args:
        chunks: A document in pieces of text, which may end anywhere.
        words: At least 1.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        begin = 0
        # The first word of the next passage says where this one ends, even if the chunk breaks it.
        while (end := _end(rest, begin, words)) is not None:
            yield rest[begin:end].strip()
            begin = end
        rest = rest[begin:]
    if text := rest.strip():
        yield text


def _end(text: str, begin: int, words: int) -> int | None:
    """Where the passage that begins at `begin` ends; None when there are no words behind it."""
    starts = [found.start() for found in islice(_WORD.finditer(text, begin), words + 1)]
    if len(starts) <= words:
        return None
    latest = starts[words]
    earliest = starts[words - int(_NEAR * words) - 1]
    for pattern in (_PARAGRAPH_END, _SENTENCE_END):
        found = [match.end() for match in pattern.finditer(text, earliest, latest)]
        if found:
            return found[-1]
    return latest


_CHUNK_BYTES = 2**20
_ZSTD_CHUNK_BYTES = 64 * 1024
_BATCH_ROWS = 256
_LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
_COMPRESSED = ("", ".gz", ".zst")
_KEY = "assembly.corpus"


def read_documents(patterns: Sequence[str], field: str) -> Iterator[Iterable[str]]:
    """The documents in files, directories and globs, each as pieces of text; the same order every time.

    Raises:
        ConfigError: A file is not there, cannot be read, or has rows without text; the message names it.
    """
    for pattern in patterns:
        for path in _files(pattern):
            yield from _documents(path, field)


def _files(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) is not None)
    elif path.exists():
        found = [path]
    else:
        named = glob.glob(pattern, recursive=True)  # noqa: PTH207 - a Path takes no absolute pattern
        found = sorted(file for name in named if (file := Path(name)).is_file())
    if not found:
        raise ConfigError(f"{_KEY}: there are no files to read at {pattern}")
    for file in found:
        if _kind(file) is None:
            raise ConfigError(f"{_KEY}: {file} is neither .txt, .jsonl (also with .gz or .zst) nor .parquet")
    return found


def _kind(path: Path) -> str | None:
    if path.suffix == ".parquet":
        return "parquet"
    for compressed in _COMPRESSED:
        if path.name.endswith(f".txt{compressed}"):
            return "text"
        if any(path.name.endswith(suffix + compressed) for suffix in _LINE_SUFFIXES):
            return "lines"
    return None


def _documents(path: Path, field: str) -> Iterator[Iterable[str]]:
    try:
        match _kind(path):
            case "parquet":
                yield from ([text] for text in _parquet(path, field))
            case "lines":
                yield from ([text] for text in _lines(path, field))
            case _:
                yield _text(path)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{_KEY}: {path} cannot be read: {error}") from error


def _text(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        for chunk in _chunks(path):
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{_KEY}: {path} is not valid UTF-8: {error}") from error
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise ConfigError(f"{_KEY}: {path} cannot be read: {error}") from error


def _lines(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_split_lines(_chunks(path)), 1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise ConfigError(f"{_KEY}: {path}:{number} is no valid JSON: {error}") from error
        yield _field(row, field, f"{path}:{number}")


def _parquet(path: Path, field: str) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(path) as file:
        if field not in file.schema_arrow.names:
            raise ConfigError(f"{_KEY}: {path} has no column {field!r}; assembly.corpus_field names it")
        number = 0
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[field]):
            for row in batch.to_pylist():
                number += 1
                yield _field(row, field, f"{path}:{number}")


def _field(row: Any, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ConfigError(f"{_KEY}: {where} has no text in {field!r}; assembly.corpus_field names the field")
    return text


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as stream:
                while chunk := stream.read1(_CHUNK_BYTES):
                    yield chunk
        elif path.suffix == ".zst":
            yield from _zstd_chunks(raw)
        else:
            while chunk := raw.read(_CHUNK_BYTES):
                yield chunk


def _zstd_chunks(raw: IO[bytes]) -> Iterator[bytes]:
    # The package's stream reader takes a file that is cut short for a whole one.
    frame = None
    while pending := raw.read(_ZSTD_CHUNK_BYTES):
        while pending:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(pending)
            pending = frame.unused_data
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last zstd frame has no end")


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for chunk in chunks:
        first, *more = chunk.split(b"\n")
        rest.append(first)
        for line in more:
            yield b"".join(rest)
            rest = [line]
    yield b"".join(rest)


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

    def shuffled(self, rng: Random) -> Iterator[CorpusPassage]:
        """The passages in random order, drawn and read one by one as they are asked for."""
        return (self[index] for index in shuffled(len(self), rng))

    def _read(self, index: int) -> CorpusPassage:
        begin, end = self._ends[index], self._ends[index + 1]
        text = os.pread(self._file, end - begin, begin).decode()
        return CorpusPassage(index, text, round(_TOKENS_A_WORD * len(text.split())))


def load_corpus(section: AssemblySection) -> Corpus:
    """The corpus that a configuration names.

    Raises:
        ConfigError: It names none, or one that cannot be read or holds no text.
    """
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
