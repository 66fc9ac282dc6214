"""Special tokens that messages spell out stay text.

Such a text is tokenized by a copy of the tokenizer in which special tokens have other names, of private
characters; the special tokens of the chat template are renamed in the text, those of messages are not.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

_NAMES = 0xF0000
"""First of the private characters that stand for special tokens in the copy, one for each."""
_PLACEHOLDERS = 0x100000
"""First of the private characters that stand for spelled tokens in messages."""
_MAX_TOKENS = 0xFFFD
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
_BRACKETED = re.compile(r"<[^<>\s]{1,80}>|\[[^\[\]\s]{1,80}\]")
"""Nearly all special tokens look like this; looking for each of them, often hundreds, would be slower."""


class Unspeakable(Exception):
    """Raised when a text with special tokens cannot be tokenized as text; its message says why."""


class SpelledTokens:
    """Finds special tokens that messages spell out, and tokenizes texts in which they are to stay text.

    Args:
        special: The special tokens by number.
        backend: The tokenizer in the format of the package tokenizers; None if there is none.
    """

    def __init__(self, special: Mapping[int, str], backend: Tokenizer | None) -> None:
        self._backend = backend
        self._special = {text: number for number, text in special.items() if text}
        self._order = sorted(self._special, key=self._special.__getitem__)
        self._placeholders = {text: chr(_PLACEHOLDERS + place) for place, text in enumerate(self._order)}
        self._others = _any_of([text for text in self._special if not _BRACKETED.fullmatch(text)])
        self._of_template = _any_of(self._special)

    def hidden(self, messages: Sequence[dict[str, str]]) -> list[dict[str, str]] | None:
        """Return the messages with placeholders for what spells a special token; None if nothing does.

        Raises:
            Unspeakable: They cannot be tokenized as text.
        """
        if not any(self._spells(message["content"]) for message in messages):
            return None
        if self._backend is None:
            raise Unspeakable("it spells a special token, which this tokenizer cannot read as text")
        if len(self._special) > _MAX_TOKENS or any(
            _PRIVATE.search(message["content"]) for message in messages
        ):
            raise Unspeakable("it spells a special token and has characters of the private planes")
        return [message | {"content": self._hide(message["content"])} for message in messages]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a rendered text with placeholders.

        Raises:
            Unspeakable: The tokenizer does not allow it.
        """
        if self._copy is None:
            raise Unspeakable("it spells a special token, which this tokenizer cannot read as text")
        names = {known: chr(_NAMES + place) for place, known in enumerate(self._order)}
        named = self._of_template.sub(lambda found: names[found[0]], text)
        spelled = {ord(mark): known for known, mark in self._placeholders.items()}
        ids: list[int] = self._copy.encode(named.translate(spelled), add_special_tokens=False).ids
        return ids

    def last_special(self, prompt: str) -> str | None:
        """Return the end of a rendered prompt, from its last special token on; None if it has none."""
        begins = [found.start() for found in self._of_template.finditer(prompt)]
        return prompt[begins[-1] :] if begins else None

    def _spells(self, text: str) -> bool:
        bracketed = (found[0] in self._special for found in _BRACKETED.finditer(text))
        return self._others.search(text) is not None or any(bracketed)

    def _hide(self, text: str) -> str:
        for pattern in (self._others, _BRACKETED):
            text = pattern.sub(lambda found: self._placeholders.get(found[0], found[0]), text)
        return text

    @cached_property
    def _copy(self) -> Tokenizer | None:
        """The tokenizer with other names for its special tokens; None if it cannot be made. Takes seconds."""
        assert self._backend is not None, "checked in `hidden`"
        spec = json.loads(self._backend.to_str())
        spec |= {"truncation": None, "padding": None, "post_processor": None}
        names = {known: chr(_NAMES + place) for place, known in enumerate(self._order)}
        for token in spec["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        _rename(spec["model"], names)
        made = Tokenizer.from_str(json.dumps(spec))
        same = all(made.token_to_id(names[known]) == number for known, number in self._special.items())
        return made if same else None


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename entries of a model's vocabulary: a table (BPE, WordPiece), or pairs with scores (Unigram)."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if isinstance(unknown := model.get("unk_token"), str):
        model["unk_token"] = names.get(unknown, unknown)
