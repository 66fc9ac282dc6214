import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field

from streamsyn.sglang.simulator.cache import PrefixCache, chain, count_tokens, extend


class QueueFull(Exception):
    """Raised when a request comes while all slots are taken and as many wait as may."""


class DuplicateRid(Exception):
    """Raised when a request comes with the rid of one that is still alive."""


@dataclass(slots=True, eq=False)
class Work:
    """One request in the engine: waiting, then running, then gone."""

    rid: str
    prompt: str | list[int]
    reuse_limit: int | None = None
    """No more than this many tokens are taken from the cache (`logprob_start_len`)."""
    tokens: int = 0
    keys: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    running: bool = False
    aborted: bool = False
    wake: asyncio.Future[None] | None = None

    def __post_init__(self) -> None:
        self.tokens = count_tokens(self.prompt)
        self.keys = chain(self.prompt)


def _settle(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)


class Engine:
    """Slots, a waiting queue in order of arrival, a prefix cache, and time that passes.

    `enter`, `leave` and `abort` are synchronous state transitions; `start` and `spend` only wait.
    """

    def __init__(self, slots: int, queue_limit: int | None, cache_tokens: int) -> None:
        self.slots = slots
        self.cache = PrefixCache(cache_tokens)
        self.running = 0
        self.running_tokens = 0
        self.waiting_tokens = 0
        self._queue_limit = queue_limit
        self._waiting: OrderedDict[Work, None] = OrderedDict()
        self._live: dict[str, Work] = {}

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    def enter(self, work: Work) -> None:
        """Takes a slot if one is free, else a place in the queue.

        Raises:
            DuplicateRid: as the real server refuses a rid that is alive.
            QueueFull: no slot and no place.
        """
        if work.rid in self._live:
            raise DuplicateRid(work.rid)
        if self.running < self.slots:
            self._run(work)
        elif self._queue_limit is not None and len(self._waiting) >= self._queue_limit:
            raise QueueFull
        else:
            self._waiting[work] = None
            self.waiting_tokens += work.tokens
            work.wake = asyncio.get_running_loop().create_future()
        self._live[work.rid] = work

    def leave(self, work: Work) -> None:
        """Gives back whatever `work` holds; the first in the queue gets its slot."""
        del self._live[work.rid]
        self._unqueue(work)
        if not work.running:
            return
        self.running -= 1
        self.running_tokens -= work.tokens
        if self._waiting:
            following = next(iter(self._waiting))
            self._unqueue(following)
            self._run(following)
            _settle(following.wake)

    def abort(self, rid: str, *, exact: bool) -> int:
        """Aborts every live request whose rid begins with `rid` and says how many.

        With `exact`, nothing happens unless one of them has just this rid: SGLang 0.5.23 with one tokenizer
        worker (the default) drops an abort for a rid that it does not know before the scheduler, which
        matches prefixes, sees it (`TokenizerManager.abort_request`).
        """
        if not rid or (exact and rid not in self._live):
            return 0
        return self._abort([work for work in self._live.values() if work.rid.startswith(rid)])

    def abort_all(self) -> int:
        """Aborts every live request and says how many."""
        return self._abort(list(self._live.values()))

    async def start(self, work: Work) -> None:
        """Returns when `work` has its slot (or was aborted in the queue), with what the cache gave it."""
        if not work.running and not work.aborted and work.wake is not None:
            await work.wake
        if work.running:
            # One token at least is always computed, as the real server needs its logits.
            limit = work.tokens - 1 if work.reuse_limit is None else min(work.tokens - 1, work.reuse_limit)
            work.cached_tokens = self.cache.match(work.keys, limit)

    async def spend(self, work: Work, seconds: float | None) -> None:
        """Lets time pass, for ever if None; an abort ends it at once. No time: no trip through the loop."""
        if work.aborted or seconds == 0:
            return
        loop = asyncio.get_running_loop()
        work.wake = loop.create_future()
        timer = None if seconds is None else loop.call_later(seconds, _settle, work.wake)
        try:
            await work.wake
        finally:
            if timer is not None:
                timer.cancel()

    def remember(self, work: Work, output: str = "") -> None:
        """From now on, prompts that begin like this one (and its output) find it in the cache."""
        keys = (
            extend(work.keys, work.prompt, output) if output and isinstance(work.prompt, str) else work.keys
        )
        self.cache.insert(keys)

    def _run(self, work: Work) -> None:
        work.running = True
        self.running += 1
        self.running_tokens += work.tokens

    def _unqueue(self, work: Work) -> None:
        if work in self._waiting:
            del self._waiting[work]
            self.waiting_tokens -= work.tokens

    def _abort(self, works: list[Work]) -> int:
        for work in works:
            work.aborted = True
            self._unqueue(work)
            _settle(work.wake)
        return len(works)
