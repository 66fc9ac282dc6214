"""Control tokens spelled out in a text, such as `<|im_end|>`, and where the turn of a model ends by them.

Servers should stop at them and leave them out. Some do not, and models write a second turn behind them.
"""

import re
from bisect import bisect_right
from functools import cached_property
from itertools import islice

_ENDS = (
    "<|im_end|>",  # Qwen, SmolLM, InternLM, Kimi
    "<|eot_id|>",  # Llama 3
    "<|eom_id|>",
    "<|end_of_text|>",  # Llama 3, Granite
    "<|eot|>",  # Llama 4
    "<|endoftext|>",  # GPT-2, Qwen, GLM
    "<|end|>",  # Phi, gpt-oss
    "<|return|>",  # gpt-oss
    "<|call|>",
    "<|endofturn|>",  # EXAONE
    "[|endofturn|]",
    "<|end_of_turn|>",  # OpenChat
    "<end_of_turn>",  # Gemma 2 and 3
    "<turn|>",  # Gemma 4
    "<|END_OF_TURN_TOKEN|>",  # Command
    "<|END_RESPONSE|>",
    "<｜end▁of▁sentence｜>",  # DeepSeek  # noqa: RUF001
    "<|eos|>",
    "<eos>",
    "[EOS]",
    "<|EOT|>",
    "<|role_end|>",  # Ling
    "<|hy_eos|>",  # Hunyuan
    "<seed:eos>",
)
"""Tokens that end a turn."""
_WEAK_END = "</s>"
"""Ends a turn in Llama 2 and Mistral, and struck-out text in HTML."""
_BEGINS = (
    "<|im_start|>",
    "<|start_header_id|>",
    "<|header_start|>",
    "<|begin_of_text|>",
    "<|start|>",
    "<start_of_turn>",
    "<|turn>",
    "<|START_OF_TURN_TOKEN|>",
    "<|start_of_role|>",
    "<｜begin▁of▁sentence｜>",  # noqa: RUF001
    "<|startoftext|>",
    "<bos>",
    "<s>",
    "<seed:bos>",
    "[gMASK]",
)
"""Tokens that begin a turn or a text; the role follows."""
_ROLES = (
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|observation|>",
    "<｜User｜>",  # noqa: RUF001
    "<｜Assistant｜>",  # noqa: RUF001
    "[INST]",
)
"""Tokens that begin a turn and name its role."""


def _any_of(tokens: tuple[str, ...], then: str = "") -> str:
    return "|".join(re.escape(token) + then for token in sorted(tokens, key=len, reverse=True))


_ANY = rf"(?:{_any_of((*_ENDS, _WEAK_END, *_BEGINS, *_ROLES))}|<\|\w{{1,40}}\|>)"
_TOKEN = re.compile(_ANY)
_END = re.compile(_any_of(_ENDS))
_ROLE = r"(?:assistant|user|system|model|tool|ipython|developer)\b"
_THEN_ROLE = rf"\s*{_ROLE}"
_LEADING = re.compile(
    rf"\s*(?:{_any_of((*_BEGINS, *_ROLES))})(?:{_ROLE}\s*(?:<\|end_header_id\|>|<\|header_end\|>)?)?\s*"
)
_NEXT_TURN = re.compile(
    rf"{_WEAK_END}\s*(?:{_any_of((*_BEGINS, *_ROLES))})"
    rf"|{_any_of(_BEGINS, _THEN_ROLE)}"  # each by itself: `re` finds the first characters fast
    rf"|{_any_of(_ROLES)}"
)
_HINT = re.compile(r"<[|/\w\uff5c]|\[[A-Z|g]")
"""Every token begins like this; a text without it needs no further search."""
_BRACKETS = ("<", "[")
"""The first characters of tokens, which are found much faster than `_HINT`."""
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
_APART = frozenset(" \t\"'`()[]{},;:\u2018\u2019\u201c\u201d\u00ab\u00bb")
"""Characters before a mark that the text talks about."""
_REACH = 80
"""Characters looked at for the beginning or end of a line."""


class Fences:
    """The fenced code blocks of a text, in which marks are quoted."""

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def _at(self) -> list[int]:
        return [fence.start() for fence in _FENCE.finditer(self._text)]

    def contains(self, place: int) -> bool:
        """Whether a place is within a block that has an end."""
        before = bisect_right(self._at, place)
        return before % 2 == 1 and before < len(self._at)


def is_mentioned(text: str, start: int, end: int) -> bool:
    """Whether the text talks about the mark `text[start:end]`, as a word of a sentence.

    A mark that begins or ends a line is not mentioned, nor is one that touches the word before it.
    """
    before, after = text[max(0, start - _REACH) : start], text[end : end + _REACH]
    if not before.strip(" \t") or before.rstrip(" \t").endswith("\n"):
        return False
    if not after.strip(" \t") or after.lstrip(" \t").startswith("\n"):
        return False
    return before[-1] in _APART


def first_turn(text: str) -> tuple[str, bool]:
    """Return the text up to the control token that ends it, and whether there was one.

    Control tokens before the text are removed too. Those that the text mentions are kept.
    """
    if not _has_hint(text):
        return text, False
    text = text[text_start(text) :]
    fences, ends = Fences(text), list[int]()
    for pattern in (_END, _NEXT_TURN):
        found = (
            mark.start()
            for mark in pattern.finditer(text)
            if not fences.contains(mark.start()) and not is_mentioned(text, *mark.span())
        )
        ends += islice(found, 1)
    end = min(ends, default=len(text))
    for start, stop in reversed([token.span() for token in _TOKEN.finditer(text, 0, end)]):
        if text[stop:end].strip():
            break
        end = start
    return text[:end].rstrip() if end < len(text) else text, end < len(text)


def text_start(text: str) -> int:
    """Return where a text begins, behind control tokens that begin a turn."""
    start = 0
    while lead := _LEADING.match(text, start):
        start = lead.end()
    return start


def has_control_tokens(text: str) -> bool:
    """Whether a control token is spelled out in the text."""
    return _has_hint(text) and _TOKEN.search(text) is not None


def _has_hint(text: str) -> bool:
    return any(bracket in text for bracket in _BRACKETS) and _HINT.search(text) is not None
