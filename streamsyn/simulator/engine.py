"""What both engines share: the request in an engine, the engine's interface, and its load."""

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from streamsyn.simulator.radix_cache import Node, block_keys
from streamsyn.simulator.texts import count_tokens


class QueueFull(Exception):
    """Raised when a request arrives and the queue is full."""


class DuplicateRid(Exception):
    """Raised when a request has the rid of a live request."""


class ServerLost(ConnectionResetError):
    """Raised for all live requests when the server goes down."""


@dataclass(slots=True, eq=False)
class Work:
    """One request in an engine: waiting, then running, then over."""

    rid: str
    prompt: str | list[int]
    reuse_limit: int | None = None
    """Maximum tokens taken from the cache (`logprob_start_len`); None for no limit."""
    target: int = 0
    """Tokens that will be generated."""
    max_new_tokens: int | None = None
    """Maximum new tokens of the request, which the scheduler reserves."""
    rank: int | None = None
    """The data-parallel rank that it names; None for the next in turn."""
    piece: int = 0
    """Tokens in one event of a streamed answer; 0 if not streamed."""
    stalls: bool = False
    """Whether it runs without ever generating a token."""
    tokens: int = 0
    cached_tokens: int = 0
    running: bool = False
    """Whether it has been admitted to the running batch, or to a slot."""
    aborted: bool = False
    lost: bool = False
    """Whether the server went down while it was live."""
    over: bool = False
    """Whether the engine has finished it."""
    retractions: int = 0
    wake: asyncio.Future[None] | None = None
    # The fields below are used by `Batching` only.
    output: str = ""
    """The complete answer, for the prefix cache."""
    written: int = 0
    """Tokens generated, as of the last event of this request."""
    node: Node | None = None
    """The node where its locked prefix ends in the cache."""
    locked: int = 0
    """Tokens of that prefix."""
    private: int = 0
    """Other tokens that it holds in the pool; while it decodes, as of when it joined the batch."""
    joined: int = 0
    """Decode steps of the server when it joined the running batch."""
    start: int = 0
    """Tokens generated when it joined the running batch."""
    entry: int = 0
    """Number of its entry in the heap of milestones."""
    _keys: list[int] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.tokens = count_tokens(self.prompt)

    @property
    def keys(self) -> list[int]:
        """One key per whole block of the prompt; computed once."""
        if self._keys is None:
            self._keys = block_keys(self.prompt)
        return self._keys

    @property
    def reusable(self) -> int:
        """Maximum tokens from the cache: at least one is computed, since its logits are needed."""
        return self.tokens - 1 if self.reuse_limit is None else min(self.tokens - 1, self.reuse_limit)


def settle(work: Work) -> None:
    """Wake the asyncio task that waits for `work`."""
    if work.wake is not None and not work.wake.done():
        work.wake.set_result(None)


class Clearable(Protocol):
    """A prefix cache that can be cleared."""

    def clear(self) -> None:
        """Evict everything that is not locked."""


class Engine(Protocol):
    """The interface of both engines: requests go in, time passes, tokens come out.

    `enter`, `leave` and the aborts are synchronous; `begin` and `write` only wait. All are called within a
    running event loop and use its clock.
    """

    @property
    def speed(self) -> float:
        """Speed factor: 1 is nominal, 0.5 half as fast."""
        ...

    @speed.setter
    def speed(self, speed: float) -> None: ...

    @property
    def cache(self) -> "Clearable":
        """The prefix cache."""
        ...

    @property
    def running(self) -> int:
        """Running requests."""
        ...

    @property
    def waiting(self) -> int:
        """Waiting requests."""
        ...

    def enter(self, work: Work) -> None:
        """Accept a request.

        Raises:
            DuplicateRid: A live request has its rid.
            QueueFull: The queue is full.
        """

    async def begin(self, work: Work) -> None:
        """Wait for the first token or an abort; after an abort in the queue `work.running` is False."""

    async def write(self, work: Work, tokens: int) -> int:
        """Wait until `tokens` tokens in all are generated, or for an abort. Return how many there are."""
        ...

    def leave(self, work: Work) -> None:
        """Release what `work` holds; call it once for each request that entered."""

    def abort(self, rid: str, *, exact: bool) -> int:
        """Abort every live request whose rid starts with `rid`. Return how many there were.

        With `exact`, nothing happens unless one of them has exactly this rid. SGLang 0.5.23 with one
        tokenizer worker (the default) drops aborts of unknown rids (`TokenizerManager.abort_request`) before
        they reach the scheduler, which matches prefixes.
        """
        ...

    def abort_all(self) -> int:
        """Abort every live request. Return how many there were."""
        ...

    def lose_all(self) -> None:
        """Lose all live requests and the cache, as when the process dies."""

    def load(self) -> "Load":
        """Return the load metrics for `/v1/loads`."""
        ...


@dataclass(frozen=True, slots=True)
class Load:
    """Load metrics of an engine, from which `/v1/loads` is made."""

    running: int
    waiting: int
    waiting_tokens: int
    waiting_uncached_tokens: int | None
    """Prompt tokens still to compute; None: estimate them from the hit rate."""
    used_tokens: int
    pool_tokens: int
    max_running_requests: int
    cache_hit_rate: float | None = None
    """Cache hit rate of the last admitted request; None: unknown to the engine."""
    generated_tokens: int | None = None
    """Tokens generated since the start, without lost ones; None: use the answers sent."""
    prefilled_tokens: int | None = None
    """Prompt tokens computed since the start; None: use the answers sent."""
    retracted: int = 0
    """Requests retracted from the batch just now."""
    retracted_in_all: int = 0
