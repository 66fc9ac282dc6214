"""Long documents into passages, at the end of a paragraph or a sentence where one is near."""

import re
from collections.abc import Iterable, Iterator
from itertools import islice

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
