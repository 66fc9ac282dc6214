"""What stands for reading and understanding: words that were met before are likelier, and a question is
answered with the sentence that has most of its words.
"""

import re
from typing import Final

from streamsyn.sglang.simulator.cache import CHARACTERS_A_TOKEN
from streamsyn.sglang.simulator.tokens import token_ids

NEW: Final = 2.3
"""Mean negative log-likelihood, in nats, of a token of a word that does not stand before it. A real model
gave 2.3 a token for an answer without its context, and half of that with it."""
MET: Final = 0.6
"""The same for one of a word that does."""
_MOST_PIECES: Final = 2**20
_BEGINNING: Final = -1
"""In place of the id before the first."""
_WORD: Final = re.compile(r"\w+")
_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+")
_ANSWER: Final = re.compile(r"^Answer:\s*\n?(?P<answer>\S.*?)\s*(?:\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


class Spelling:
    """Which text token ids stand for, as far as the simulator has made them from one.

    Different pieces of text may have one id, so a piece is looked up by the id before it too.
    """

    def __init__(self) -> None:
        self._pieces: dict[tuple[int, int], str] = {}

    def learn(self, text: str) -> list[int]:
        """The ids of `text`, which are known from now on."""
        ids, step = token_ids(text), CHARACTERS_A_TOKEN
        if len(self._pieces) > _MOST_PIECES:
            self._pieces.clear()
        pairs = zip([_BEGINNING, *ids], ids, strict=False)
        self._pieces.update((pair, text[n * step : (n + 1) * step]) for n, pair in enumerate(pairs))
        return ids

    def text(self, ids: list[int]) -> str | None:
        """What they stand for, four characters each (a text's last piece may lack some); None where they were
        not made here. One text may follow another.
        """
        known = self._pieces
        pieces = [
            known.get(pair) or known.get((_BEGINNING, pair[1]), "")
            for pair in zip([_BEGINNING, *ids], ids, strict=False)
        ]
        return "".join([piece.ljust(CHARACTERS_A_TOKEN) for piece in pieces]) if all(pieces) else None


def surprise(before: str, text: str) -> list[float]:
    """The mean negative log-likelihood of each token of `text`, when `before` has been read."""
    met = {word.lower() for word in _WORD.findall(before)}
    step = CHARACTERS_A_TOKEN
    means = [MET] * -(-len(text) // step)
    for word in _WORD.finditer(text):
        if word[0].lower() not in met:
            first, last = word.start() // step, (word.end() - 1) // step
            means[first : last + 1] = [NEW] * (last + 1 - first)
    return means


def found(message: str) -> str:
    """The sentence that answers: of all but the last two paragraphs, which ask, the one that has most words
    in common with these. "" where none has any.
    """
    *context, question, how = ["", "", *message.split("\n\n")]
    asked = {word.lower() for word in _WORD.findall(f"{question} {how}")}
    sentences = [sentence for paragraph in context for sentence in _SENTENCE_END.split(paragraph.strip())]
    best = max(sentences, key=lambda sentence: len(asked.intersection(_WORD.findall(sentence.lower()))))
    return best if asked.intersection(_WORD.findall(best.lower())) else ""


def told(prompt: str) -> str:
    """What stands below `Answer:` in a prompt; "" where there is nothing."""
    answer = _ANSWER.search(prompt)
    return " ".join(answer["answer"].split()) if answer else ""
