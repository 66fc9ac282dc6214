"""Tokens without a model: four characters each, with ids, and logprobs that depend on the context."""

import re
from collections.abc import Sequence
from typing import Final
from zlib import crc32

CHARACTERS_PER_TOKEN: Final = 4
VOCABULARY: Final = 49_152
NEW_WORD_LOSS: Final = 2.3
"""Mean negative log-likelihood, in nats, of a token of a word that does not stand before it. A real model
gave 2.3 a token for an answer without its context, and half of that with it."""
KNOWN_WORD_LOSS: Final = 0.6
"""The same for one of a word that does."""
_MOST_PIECES: Final = 2**20
_BEGINNING: Final = -1
"""In place of the id before the first."""
_WORD: Final = re.compile(r"\w+")


def count_tokens(content: str | Sequence[int]) -> int:
    """Four characters make a token; token ids count as they are."""
    return -(-len(content) // CHARACTERS_PER_TOKEN) if isinstance(content, str) else len(content)


def token_ids(content: str | list[int], start: int = 0) -> list[int]:
    """The ids from token `start` on: one for each four characters; ids stay as they are."""
    if not isinstance(content, str):
        return content[start:]
    step = CHARACTERS_PER_TOKEN
    return [
        crc32(content[at : at + step].encode("utf-8", "surrogatepass")) % VOCABULARY
        for at in range(start * step, len(content), step)
    ]


class Tokenizer:
    """Which text token ids stand for, as far as the simulator has made them from one.

    Different pieces of text may have one id, so a piece is looked up by the id before it too.
    """

    def __init__(self) -> None:
        self._pieces: dict[tuple[int, int], str] = {}

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, which are known from now on."""
        ids, step = token_ids(text), CHARACTERS_PER_TOKEN
        if len(self._pieces) > _MOST_PIECES:
            self._pieces.clear()
        pairs = zip([_BEGINNING, *ids], ids, strict=False)
        self._pieces.update((pair, text[n * step : (n + 1) * step]) for n, pair in enumerate(pairs))
        return ids

    def decode(self, ids: list[int]) -> str | None:
        """What they stand for, four characters each (a text's last piece may lack some); None where they were
        not made here. One text may follow another.
        """
        known = self._pieces
        pieces = [
            known.get(pair) or known.get((_BEGINNING, pair[1]), "")
            for pair in zip([_BEGINNING, *ids], ids, strict=False)
        ]
        return "".join([piece.ljust(CHARACTERS_PER_TOKEN) for piece in pieces]) if all(pieces) else None


def token_losses(before: str, text: str) -> list[float]:
    """The mean negative log-likelihood of each token of `text`, when `before` has been read."""
    known = {word.lower() for word in _WORD.findall(before)}
    step = CHARACTERS_PER_TOKEN
    means = [KNOWN_WORD_LOSS] * -(-len(text) // step)
    for word in _WORD.finditer(text):
        if word[0].lower() not in known:
            first, last = word.start() // step, (word.end() - 1) // step
            means[first : last + 1] = [NEW_WORD_LOSS] * (last + 1 - first)
    return means
