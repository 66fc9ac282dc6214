"""Tokens without a model: four characters each, with ids, and logprobs that depend on the context."""

import re
from collections.abc import Sequence
from typing import Final
from zlib import crc32

CHARACTERS_PER_TOKEN: Final = 4
VOCABULARY: Final = 49_152
NEW_WORD_LOSS: Final = 2.3
"""Mean negative log-likelihood, in nats, of a token whose word did not occur before. A real model gave 2.3
per token for an answer without its context, and half of that with it."""
KNOWN_WORD_LOSS: Final = 0.6
"""The same for a token whose word occurred before."""
_MAX_PIECES: Final = 2**20
_START: Final = -1
"""Stands for the id before the first one."""
_WORD: Final = re.compile(r"\w+")


def count_tokens(content: str | Sequence[int]) -> int:
    """Return the number of tokens: one per four characters of a text, or the number of ids."""
    return -(-len(content) // CHARACTERS_PER_TOKEN) if isinstance(content, str) else len(content)


def token_ids(content: str | list[int], start: int = 0) -> list[int]:
    """Return the ids from token `start` on; ids are returned unchanged."""
    if not isinstance(content, str):
        return content[start:]
    step = CHARACTERS_PER_TOKEN
    return [
        crc32(content[at : at + step].encode("utf-8", "surrogatepass")) % VOCABULARY
        for at in range(start * step, len(content), step)
    ]


class Tokenizer:
    """Encodes text, and decodes ids that it has made itself.

    Different pieces of text may share an id, so a piece is looked up together with the id before it.
    """

    def __init__(self) -> None:
        self._pieces: dict[tuple[int, int], str] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, and remember them for `decode`."""
        ids, step = token_ids(text), CHARACTERS_PER_TOKEN
        if len(self._pieces) > _MAX_PIECES:
            self._pieces.clear()
        pairs = zip([_START, *ids], ids, strict=False)
        self._pieces.update((pair, text[n * step : (n + 1) * step]) for n, pair in enumerate(pairs))
        return ids

    def decode(self, ids: list[int]) -> str | None:
        """Return the text of `ids`, or None if `encode` did not make them; several texts may be joined.

        Each id gives four characters; the last piece of a text is padded with spaces.
        """
        known = self._pieces
        pieces = [
            known.get(pair) or known.get((_START, pair[1]), "")
            for pair in zip([_START, *ids], ids, strict=False)
        ]
        return "".join([piece.ljust(CHARACTERS_PER_TOKEN) for piece in pieces]) if all(pieces) else None


def token_losses(before: str, text: str) -> list[float]:
    """Return the negative log-likelihood of each token of `text` after `before`, in nats."""
    known = {word.lower() for word in _WORD.findall(before)}
    step = CHARACTERS_PER_TOKEN
    means = [KNOWN_WORD_LOSS] * -(-len(text) // step)
    for word in _WORD.finditer(text):
        if word[0].lower() not in known:
            first, last = word.start() // step, (word.end() - 1) // step
            means[first : last + 1] = [NEW_WORD_LOSS] * (last + 1 - first)
    return means
