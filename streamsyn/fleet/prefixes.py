"""The prefix cache of a server: a model of what it should hold, and warm-up of prefixes that requests share.

Requests with the same prefix that are prefilled together each compute that prefix. So the first one, the
leader, goes alone until its first token shows that its prompt is in the cache; the others follow. (SGLang
does the same for requests in its own queue, but only under `lpm`: sglang#2442.)
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from streamsyn.fleet.thinking import template_fields
from streamsyn.records import Request

BLOCK_CHARS = 256
"""Prefixes are compared in blocks of this many characters, about 64 tokens."""
CHARS_PER_TOKEN = 4
POOL_TOKENS = 400_000
"""Assumed size of a server's KV pool until it reports its own."""
MAX_BLOCKS = 2**18
"""Most blocks of one server, about 17 million tokens: its own figure may be wrong, and memory is bounded."""
_MAX_WARM = 16_384
"""Warm prefixes remembered per server."""

W = TypeVar("W")


class PrefixModel:
    """The prefixes that one server should have in its cache: a chain of text blocks each, with LRU eviction.

    A server cannot be asked what its cache holds. This predicts it; `cached_tokens` in its answers is the
    measured value.
    """

    def __init__(self, pool_tokens: int = POOL_TOKENS) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self.resize(pool_tokens)

    def __len__(self) -> int:
        return len(self._blocks)

    def resize(self, pool_tokens: int) -> None:
        """Set the size of the server's KV pool in tokens."""
        self._max_blocks = min(max(1, pool_tokens * CHARS_PER_TOKEN // BLOCK_CHARS), MAX_BLOCKS)
        self._evict()

    def cached_share(self, text: str, keys: list[int]) -> float:
        """Return the share of `text`, whose block keys are `keys`, that should be in the cache: 0 to 1."""
        if not text:
            return 0.0
        held = 0
        for key in keys:
            if key not in self._blocks:
                break
            held += 1
        self._touch(keys[:held])
        return held * BLOCK_CHARS / len(text)

    def add(self, keys: list[int]) -> None:
        """Record that the server has computed the text with these block keys."""
        for key in keys:
            self._blocks[key] = None
        self._touch(keys)
        self._evict()

    def clear(self) -> None:
        """Forget everything: the server may have been restarted."""
        self._blocks.clear()

    def _touch(self, keys: Iterable[int]) -> None:
        for key in reversed(list(keys)):  # the first blocks are evicted last
            self._blocks.move_to_end(key)

    def _evict(self) -> None:
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)


def conversation_text(request: Request) -> str:
    """Return the messages as one text, such that a continued conversation starts with the one before.

    What the chat template sees besides them comes first: it may change a prompt from its beginning on.
    """
    fields = template_fields(request)
    seen = f"\x01{sorted(fields.items())}" if fields else ""
    return seen + "".join([f"\x02{message['role']}\n{message['content']}" for message in request.messages])


def with_answer(text: str, answer: str) -> str:
    """Return the text of a conversation, extended by its answer."""
    return f"{text}\x02assistant\n{answer}"


def block_keys(text: str, known: list[int] | None = None) -> list[int]:
    """Return a key for each whole block of `text`; it identifies that block and all before it.

    Args:
        text: From `conversation_text`.
        known: Keys of the blocks that `text` begins with, if they have been computed.
    """
    keys = list(known or ())
    key = keys[-1] if keys else 0
    for start in range(len(keys) * BLOCK_CHARS, len(text) - BLOCK_CHARS + 1, BLOCK_CHARS):
        key = hash((key, text[start : start + BLOCK_CHARS]))
        keys.append(key)
    return keys


@dataclass(slots=True)
class PrefixWarmUp(Generic[W]):
    """Which shared prefixes one server has in its cache, and which requests wait for a leader there."""

    followers: int = 0
    """Requests that wait for a leader."""
    _warm: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _followers_of: dict[str, list[W]] = field(default_factory=dict)

    @property
    def warming(self) -> set[str]:
        """Keys of the prefixes that a leader is bringing into the cache."""
        return set(self._followers_of)

    def find_leader(self, prefixes: tuple[str, ...]) -> str | None:
        """Return the first of `prefixes` that has a leader in flight, if any has."""
        if not self._followers_of:
            return None
        return next((key for key in prefixes if key in self._followers_of), None)

    def lead(self, prefixes: tuple[str, ...]) -> tuple[str, ...]:
        """Record that a request is sent. Return the cold prefixes that it leads."""
        cold = tuple(key for key in prefixes if key not in self._warm)
        for key in cold:
            self._followers_of.setdefault(key, [])
        return cold

    def follow(self, key: str, waiter: W) -> None:
        """Have `waiter` wait for the leader of `key`."""
        self._followers_of[key].append(waiter)
        self.followers += 1

    def release(self, keys: tuple[str, ...], *, warm: bool) -> list[W]:
        """Return the followers of `keys`, which need not wait any longer.

        Args:
            keys: Prefixes of one leader.
            warm: Whether they are in the cache: its first token came, or the wait was long enough. False
                after a failure.
        """
        released = []
        for key in keys:
            released += self._followers_of.pop(key, [])
            if warm:
                self._warm[key] = None
                self._warm.move_to_end(key)
        while len(self._warm) > _MAX_WARM:
            self._warm.popitem(last=False)
        self.followers -= len(released)
        return released

    def waiting(self) -> list[W]:
        """Return all followers."""
        return [waiter for waiters in self._followers_of.values() for waiter in waiters]

    def clear(self) -> list[W]:
        """Forget all prefixes, since the server's cache is lost. Return the followers."""
        self._warm.clear()
        return self.release(tuple(self._followers_of), warm=False)
