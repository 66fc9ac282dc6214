"""What a server's prefix cache should hold, going by what it was sent: a radix model, in characters.

One leader for each cold beginning: who goes first, and who waits for it. A plain state machine.

Requests that begin alike and are prefilled together each compute the same beginning. So the first one
goes alone until its first token shows that its prompt is in the cache. (SGLang does the like for what is
in its queue, but only under `lpm`: sglang#2442.)
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from streamsyn.records import Request

if TYPE_CHECKING:
    pass

BLOCK_CHARS = 256
"""Beginnings are told apart by blocks of this many characters, some 64 tokens."""
CHARS_A_TOKEN = 4
POOL_TOKENS = 400_000
"""Taken for the size of a server's KV pool until it has said what it is."""


def rendered(request: Request) -> str:
    """A request's conversation as one text, such that one that goes on begins with the one before."""
    return "".join([f"\x02{message['role']}\n{message['content']}" for message in request.messages])


def answered(text: str, answer: str) -> str:
    """The conversation of `rendered`, with the answer to it."""
    return f"{text}\x02assistant\n{answer}"


def chain(text: str, known: list[int] | None = None) -> list[int]:
    """A key for each whole block of `text`: it stands for that block and all before it.

    Args:
        text: As `rendered` makes it.
        known: The keys of what it begins with.
    """
    keys = list(known or ())
    key = keys[-1] if keys else 0
    for start in range(len(keys) * BLOCK_CHARS, len(text) - BLOCK_CHARS + 1, BLOCK_CHARS):
        key = hash((key, text[start : start + BLOCK_CHARS]))
        keys.append(key)
    return keys


class PrefixModel:
    """The beginnings that one server has seen and not yet had to forget; the least recently used go first.

    The server's own cache cannot be asked what it holds; this says what it should hold, and the answers'
    `cached_tokens` say whether it did.
    """

    def __init__(self, pool_tokens: int = POOL_TOKENS) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self.resize(pool_tokens)

    def __len__(self) -> int:
        return len(self._blocks)

    def resize(self, pool_tokens: int) -> None:
        """The server has said how many tokens its KV pool holds."""
        self._most = max(1, pool_tokens * CHARS_A_TOKEN // BLOCK_CHARS)
        self._forget()

    def share(self, text: str, keys: list[int]) -> float:
        """Share of `text`, whose chain is `keys`, that the server should find in its cache."""
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
        """The server has computed the text whose chain is `keys`."""
        for key in keys:
            self._blocks[key] = None
        self._touch(keys)
        self._forget()

    def clear(self) -> None:
        """The server may have been started anew."""
        self._blocks.clear()

    def _touch(self, keys: Iterable[int]) -> None:
        for key in reversed(list(keys)):  # what comes first is needed longest
            self._blocks.move_to_end(key)

    def _forget(self) -> None:
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)


W = TypeVar("W")

_KNOWN = 16_384
"""Beginnings remembered a server."""


@dataclass(slots=True)
class PrefixWarmUp(Generic[W]):
    """What one server has in its cache of the beginnings that requests share, by their keys."""

    followers: int = 0
    """Requests that wait for a leader."""
    _warm: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _led: dict[str, list[W]] = field(default_factory=dict)

    def led(self, beginnings: tuple[str, ...]) -> str | None:
        """The first of `beginnings` that another request is just bringing in, if any is."""
        return next((key for key in beginnings if key in self._led), None) if self._led else None

    def lead(self, beginnings: tuple[str, ...]) -> tuple[str, ...]:
        """A request that is not to wait goes out; the beginnings that it is the first with."""
        cold = tuple(key for key in beginnings if key not in self._warm)
        for key in cold:
            self._led.setdefault(key, [])
        return cold

    def follow(self, key: str, waiter: W) -> None:
        """`waiter` waits for the leader of `key`."""
        self._led[key].append(waiter)
        self.followers += 1

    def release(self, keys: tuple[str, ...], *, warm: bool) -> list[W]:
        """A leader's first token came (or the wait was long enough), or it failed; who need wait no more."""
        released = []
        for key in keys:
            released += self._led.pop(key, [])
            if warm:
                self._warm[key] = None
                self._warm.move_to_end(key)
        while len(self._warm) > _KNOWN:
            self._warm.popitem(last=False)
        self.followers -= len(released)
        return released

    def waiting(self) -> list[W]:
        """Who waits for a leader."""
        return [waiter for waiters in self._led.values() for waiter in waiters]

    def clear(self) -> list[W]:
        """The server is gone, and its cache with it; who waited."""
        self._warm.clear()
        return self.release(tuple(self._led), warm=False)
