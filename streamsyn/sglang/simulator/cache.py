from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

CHARACTERS_A_TOKEN: Final = 4
BLOCK_TOKENS: Final = 64
"""Prefixes are shared in whole blocks of this many tokens."""


def count_tokens(content: str | Sequence[int]) -> int:
    """Four characters make a token; token ids count as they are."""
    return -(-len(content) // CHARACTERS_A_TOKEN) if isinstance(content, str) else len(content)


def chain(content: str | Sequence[int], after: int = 0) -> list[int]:
    """One key for each whole block: it stands for that block and all before it (`after` for those)."""
    keys = []
    if isinstance(content, str):
        step = BLOCK_TOKENS * CHARACTERS_A_TOKEN
        for start in range(0, len(content) - step + 1, step):
            after = hash((after, content[start : start + step]))
            keys.append(after)
        return keys
    for start in range(0, len(content) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        after = hash((after, tuple(content[start : start + BLOCK_TOKENS])))
        keys.append(after)
    return keys


def extend(keys: list[int], prompt: str, output: str) -> list[int]:
    """The keys of `prompt + output`, where `keys` are those of `prompt`."""
    rest = prompt[len(keys) * BLOCK_TOKENS * CHARACTERS_A_TOKEN :] + output
    return keys + chain(rest, keys[-1] if keys else 0)


class PrefixCache:
    """Which prefixes the server still holds, as a bounded set of chained block keys."""

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity = capacity_tokens // BLOCK_TOKENS
        self._blocks: OrderedDict[int, None] = OrderedDict()

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return len(self._blocks) * BLOCK_TOKENS

    def match(self, keys: list[int], limit_tokens: int) -> int:
        """Tokens of the longest held prefix, at most `limit_tokens`; marks it as used."""
        held = 0
        for key in keys[: max(0, limit_tokens) // BLOCK_TOKENS]:
            if key not in self._blocks:
                break
            held += 1
        self._touch(keys[:held])
        return held * BLOCK_TOKENS

    def insert(self, keys: list[int]) -> None:
        """Holds the prefix that `keys` stand for; the least recently used blocks beyond the capacity go."""
        for key in keys:
            self._blocks[key] = None
        self._touch(keys)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        """Holds nothing."""
        self._blocks.clear()

    def _touch(self, keys: list[int]) -> None:
        # A prefix is always newer than what follows it: eviction takes leaves first, as in a radix tree.
        for key in reversed(keys):
            self._blocks.move_to_end(key)
