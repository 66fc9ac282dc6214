import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from streamsyn.simulator.radix_cache import Node, block_keys
from streamsyn.simulator.tokens import count_tokens


class QueueFull(Exception):
    """Raised when a request comes while as many wait as may."""


class DuplicateRid(Exception):
    """Raised when a request comes with the rid of one that is still alive."""


class ServerLost(ConnectionResetError):
    """Raised for whatever runs or waits when the server goes down."""


@dataclass(slots=True, eq=False)
class Work:
    """One request in the engine: waiting, then running, then gone."""

    rid: str
    prompt: str | list[int]
    reuse_limit: int | None = None
    """No more than this many tokens are taken from the cache (`logprob_start_len`)."""
    target: int = 0
    """Tokens that will be written."""
    max_new_tokens: int | None = None
    """Tokens that were asked for at most: what a scheduler that cannot look ahead reserves."""
    piece: int = 0
    """Tokens in one event of a streamed answer; 0: only the end is waited for."""
    stalls: bool = False
    """Runs, but never writes."""
    tokens: int = 0
    cached_tokens: int = 0
    running: bool = False
    """Has been given a place in the running batch (or a slot)."""
    aborted: bool = False
    lost: bool = False
    """The server went down under it."""
    over: bool = False
    """The engine is done with it."""
    retractions: int = 0
    wake: asyncio.Future[None] | None = None
    # What follows belongs to the batch.
    output: str = ""
    """What will have been written at the end, for the prefix cache."""
    written: int = 0
    """Tokens written, up to the last event that touched this request."""
    node: Node | None = None
    """Where its locked prefix ends in the cache."""
    locked: int = 0
    """Tokens of that prefix."""
    private: int = 0
    """Tokens it holds beside that prefix; while it decodes, what it held when it joined."""
    joined: int = 0
    """Decode steps that had passed, and ..."""
    start: int = 0
    """... tokens that were written when it joined the running batch."""
    entry: int = 0
    """Number of its place in the heap of milestones."""
    _keys: list[int] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.tokens = count_tokens(self.prompt)

    @property
    def keys(self) -> list[int]:
        """One key for each whole block of the prompt; made at the first look."""
        if self._keys is None:
            self._keys = block_keys(self.prompt)
        return self._keys

    @property
    def reusable(self) -> int:
        """Tokens that may come from the cache: one at least is computed, as its logits are needed."""
        return self.tokens - 1 if self.reuse_limit is None else min(self.tokens - 1, self.reuse_limit)


def settle(work: Work) -> None:
    """Wakes who waits for `work`."""
    if work.wake is not None and not work.wake.done():
        work.wake.set_result(None)


class Clearable(Protocol):
    """A prefix cache, as far as a simulation is concerned."""

    def clear(self) -> None:
        """Forgets all that nobody holds."""


class Engine(Protocol):
    """What a simulation needs from either engine: requests go in, time passes, tokens come out.

    `enter`, `leave` and the aborts are synchronous; `begin` and `write` only wait. All of them are called
    within a running loop, whose clock is the only one that counts.
    """

    @property
    def speed(self) -> float:
        """1 is nominal, 0.5 half as fast."""
        ...

    @speed.setter
    def speed(self, speed: float) -> None: ...

    @property
    def cache(self) -> "Clearable":
        """The prefix cache."""
        ...

    @property
    def running(self) -> int:
        """Requests that run."""
        ...

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        ...

    def enter(self, work: Work) -> None:
        """Takes a request in.

        Raises:
            DuplicateRid: as the real server refuses a rid that is alive.
            QueueFull: there is no place for it.
        """

    async def begin(self, work: Work) -> None:
        """Returns at the first token, or when it was aborted (in the queue: `running` is still False)."""

    async def write(self, work: Work, tokens: int) -> int:
        """Returns when so many tokens are written in all, or at an abort; says how many there are."""
        ...

    def leave(self, work: Work) -> None:
        """Gives back whatever `work` holds; to be called once for each that entered."""

    def abort(self, rid: str, *, exact: bool) -> int:
        """Aborts every live request whose rid begins with `rid` and says how many.

        With `exact`, nothing happens unless one of them has just this rid: SGLang 0.5.23 with one tokenizer
        worker (the default) drops an abort for a rid that it does not know before the scheduler, which
        matches prefixes, sees it (`TokenizerManager.abort_request`).
        """
        ...

    def abort_all(self) -> int:
        """Aborts every live request and says how many."""
        ...

    def lose_all(self) -> None:
        """Everything alive is lost and the cache is empty, as when the process dies."""

    def load(self) -> "Load":
        """What `/v1/loads` tells."""
        ...


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine tells about itself; names are those of `/v1/loads`."""

    running: int
    waiting: int
    waiting_tokens: int
    waiting_uncached_tokens: int | None
    """Prompt tokens that are still to be computed; None: to be estimated from the hit rate."""
    used_tokens: int
    pool_tokens: int
    max_running_requests: int
    cache_hit_rate: float | None = None
    """Of the request that was admitted last; None: not known here."""
    generated_tokens: int | None = None
    """Written since the start, less what was lost with the process; None: counted elsewhere."""
    prefilled_tokens: int | None = None
    """Prompt tokens computed since the start; None: counted elsewhere."""
    retracted: int = 0
    """Requests thrown out of the batch just now."""
    retracted_in_all: int = 0
