"""One leader for each cold beginning: who goes first, and who waits for it. A plain state machine.

Requests that begin alike and are prefilled together each compute the same beginning. So the first one
goes alone until its first token shows that its prompt is in the cache. (SGLang does the like for what is
in its queue, but only under `lpm`: sglang#2442.)
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamsyn.sglang.placement import Waiter

_KNOWN = 16_384
"""Beginnings remembered a server."""


@dataclass(slots=True)
class Leaders:
    """What one server has in its cache of the beginnings that requests share, by their keys."""

    followers: int = 0
    """Requests that wait for a leader."""
    _warm: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _led: "dict[str, list[Waiter]]" = field(default_factory=dict)

    def led(self, beginnings: tuple[str, ...]) -> str | None:
        """The first of `beginnings` that another request is just bringing in, if any is."""
        return next((key for key in beginnings if key in self._led), None) if self._led else None

    def lead(self, beginnings: tuple[str, ...]) -> tuple[str, ...]:
        """A request that is not to wait goes out; the beginnings that it is the first with."""
        cold = tuple(key for key in beginnings if key not in self._warm)
        for key in cold:
            self._led.setdefault(key, [])
        return cold

    def follow(self, key: str, waiter: "Waiter") -> None:
        """`waiter` waits for the leader of `key`."""
        self._led[key].append(waiter)
        self.followers += 1

    def release(self, keys: tuple[str, ...], *, warm: bool) -> "list[Waiter]":
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

    def waiting(self) -> "list[Waiter]":
        """Who waits for a leader."""
        return [waiter for waiters in self._led.values() for waiter in waiters]

    def clear(self) -> "list[Waiter]":
        """The server is gone, and its cache with it; who waited."""
        self._warm.clear()
        return self.release(tuple(self._led), warm=False)
