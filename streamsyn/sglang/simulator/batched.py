import asyncio
import math

from streamsyn.sglang.simulator.batching import Batching
from streamsyn.sglang.simulator.engine import Load, ServerLost, Work, settle
from streamsyn.sglang.simulator.radix import RadixCache


class BatchedEngine:
    """A `Batching` server on the clock of the running loop: one timer, and a future for each who waits.

    `Engine` says what the methods do.
    """

    def __init__(self, machine: Batching) -> None:
        self.machine = machine
        self._timer: asyncio.TimerHandle | None = None
        self._set_for = math.inf

    @property
    def speed(self) -> float:
        return self.machine.speed

    @speed.setter
    def speed(self, speed: float) -> None:
        self.machine.set_speed(speed, _now())
        self._update()

    @property
    def cache(self) -> RadixCache:
        return self.machine.pool.cache

    @property
    def running(self) -> int:
        return self.machine.running

    @property
    def waiting(self) -> int:
        return len(self.machine.waiting)

    def enter(self, work: Work) -> None:
        # The timer, not this call, lets the next event happen: who comes at the same time shares a prefill.
        self.machine.enter(work, _now())
        self._update()

    def leave(self, work: Work) -> None:
        self.machine.leave(work, _now())
        self._update()

    def abort(self, rid: str, *, exact: bool) -> int:
        if not rid or (exact and self.machine.find(rid) is None):
            return 0
        return self._abort([work for work in self.machine.live() if work.rid.startswith(rid)])

    def abort_all(self) -> int:
        return self._abort(self.machine.live())

    def lose_all(self) -> None:
        for work in self.machine.lose_all(_now()):
            settle(work)
        self._update()

    async def begin(self, work: Work) -> None:
        # Without a stream nobody looks at the first token: one trip through the loop less.
        while not (work.over or (work.piece and work.written)):
            await self._wake(work)
        if work.lost:
            raise ServerLost

    async def write(self, work: Work, tokens: int) -> int:
        while not work.over and work.written < tokens:
            await self._wake(work)
        if work.lost:
            raise ServerLost
        return min(tokens, work.written)

    def load(self) -> Load:
        told = self.machine.load(_now())
        self._update()
        return told

    async def _wake(self, work: Work) -> None:
        work.wake = asyncio.get_running_loop().create_future()
        await work.wake

    def _abort(self, works: list[Work]) -> int:
        now = _now()
        for work in works:
            self.machine.abort(work, now)
        self._update()
        return len(works)

    def _update(self) -> None:
        """Wakes those to whom something happened, and sets the timer for what happens next."""
        for work in self.machine.woken():
            settle(work)
        due = self.machine.next_event_at()
        if due == self._set_for:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if due == math.inf else asyncio.get_running_loop().call_at(due, self._fire)
        self._set_for = due

    def _fire(self) -> None:
        # A loop may run a timer early, by less than its clock can tell: what it was set for is due.
        due = max(_now(), self._set_for)
        self._timer, self._set_for = None, math.inf
        for work in self.machine.advance(due):
            settle(work)
        self._update()


def _now() -> float:
    return asyncio.get_running_loop().time()
