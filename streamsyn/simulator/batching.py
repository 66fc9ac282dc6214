"""The engine of the cost models: continuous batching as a state machine, and its adapter to asyncio."""

import asyncio
import math
from typing import Final

from streamsyn.simulator.costs import CostModel
from streamsyn.simulator.cpu_time import SPENT
from streamsyn.simulator.engine import DuplicateRid, Load, QueueFull, ServerLost, Work, settle
from streamsyn.simulator.radix_cache import BLOCK_TOKENS, RadixCache
from streamsyn.simulator.scheduler import (
    Admission,
    KVPool,
    Retractions,
    RunningBatch,
    WaitingQueue,
    room_alone,
)


class Batching:
    """Continuous batching in discrete events, by the rules of SGLang's scheduler. No I/O and no clock.

    Prefill goes before decode, in batches of bounded size; a long prompt is computed in consecutive chunks.
    Admission reserves room for new tokens (PrefillAdder.add_one_req, see `Admission`). When decode runs out
    of room, the requests that generated least are retracted (ScheduleBatch.retract_decode).

    Between two events there are only decode steps. An event is the end of a prefill batch, or a step at which
    a request reaches a milestone, the pool is full or a request arrives. Durations come from the cost model,
    in nominal seconds; `speed` maps them to the caller's clock.

    Every method with `now` first processes events before `now`, so that requests that arrive at the same time
    share a prefill; events at `now` itself happen in `advance`. `now` never goes back.
    """

    def __init__(
        self,
        model: CostModel,
        *,
        queue_limit: int | None = None,
        policy: str = "fcfs",
        caching: bool = True,
        speed: float = 1.0,
    ) -> None:
        self.model: Final = model
        self._queue_limit = queue_limit
        self._policy = policy if caching else "fcfs"
        self._caching = caching
        self._speed = speed
        self._clock = (0.0, 0.0)  # caller's second, and nominal second at that time
        self.retracted = 0
        self.generated = 0
        self._prefilled_before = 0
        self._empty()

    def _empty(self) -> None:
        self.pool = KVPool(self.model.pool_tokens, caching=self._caching)
        self.waiting = WaitingQueue(self._policy)
        self.decoding = RunningBatch()
        self._admission = Admission(self.model, self.pool, self.waiting, self.decoding)
        self._stalled: dict[Work, None] = {}
        self._live: dict[str, Work] = {}
        self._leaving: list[Work] = []
        self._began = 0.0
        self._planned = 0
        self._until = math.inf  # nominal
        self._now = 0.0  # nominal
        self._retractions = Retractions()
        self._woken: list[Work] = []

    # ---- interface

    @property
    def running(self) -> int:
        """Requests in the batch, including those in a prefill."""
        return len(self.decoding) + len(self._stalled) + len(self._admission.parts)

    def next_event_at(self) -> float:
        """Return the time of the next event; infinite if there is none."""
        if self._until == math.inf:
            return math.inf
        start, nominal = self._clock
        return start + (self._until - nominal) / self._speed

    def advance(self, now: float) -> list[Work]:
        """Process all events up to `now`. Return `woken()`."""
        while self.next_event_at() <= now:
            self._process()
        return self.woken()

    def woken(self) -> list[Work]:
        """Return the requests that made progress since the last call, in order."""
        woken, self._woken = self._woken, []
        return woken

    def enter(self, work: Work, now: float) -> None:
        """Put a request into the queue; it can be admitted at the next step boundary.

        Raises:
            DuplicateRid: A live request has its rid.
            QueueFull: The queue is full; as in the real server, even if the request could run at once.
        """
        self._catch_up(now)
        if work.rid in self._live:
            raise DuplicateRid(work.rid)
        if self._queue_limit is not None and len(self.waiting) >= self._queue_limit:
            raise QueueFull
        self._live[work.rid] = work
        if room_alone(self.model, work) < 0:  # the real server too aborts what can never run
            work.aborted = True
            self._end(work)
            return
        self.waiting.add(work)
        if not self._admission.full:
            self._interrupt()

    def leave(self, work: Work, now: float) -> None:
        """Forget a request; if it is not over, it ends at the next step boundary."""
        self._catch_up(now)
        if self._live.get(work.rid) is work:
            del self._live[work.rid]
            self._cancel(work)

    def abort(self, work: Work, now: float) -> None:
        """Abort a request: at once if it waits, else at the next step boundary."""
        self._catch_up(now)
        self._cancel(work)

    def live(self) -> list[Work]:
        """Return requests that entered and have not left, in order of arrival."""
        return list(self._live.values())

    def find(self, rid: str) -> Work | None:
        """Return the live request with this rid."""
        return self._live.get(rid)

    def lose_all(self, now: float) -> list[Work]:
        """Lose all requests and the cache. Return the requests."""
        self._catch_up(now)
        lost = self.live()
        steps = self.decoding.steps
        self.generated -= sum(work.start + steps - work.joined for work in self.decoding.batch)
        for work in lost:
            work.lost = work.over = True
            work.node = None
        self._prefilled_before += self._admission.prefilled
        self._empty()
        return lost

    @property
    def speed(self) -> float:
        """Nominal seconds per second of the caller's clock."""
        return self._speed

    def set_speed(self, speed: float, now: float) -> None:
        """Change the speed from `now` on, also for the current batch."""
        self._catch_up(now)
        self._clock = (now, self._nominal(now))
        self._speed = speed

    def load(self, now: float) -> Load:
        """Return the load metrics; as in the real server, the current prefill batch is not counted."""
        self._catch_up(now)
        steps = self._steps_done(now)
        growth = steps * len(self.decoding)
        if self.waiting.sorts:  # else the real server has not matched prefixes, and uses the recent hit rate
            blocks = sum(self.pool.cache.measure(work.keys, touch=False) for work in self.waiting)
            uncached = self.waiting.tokens - blocks * BLOCK_TOKENS
        else:
            hit_rate = self._admission.hits.recent(self._nominal(now))
            uncached = int(self.waiting.tokens * (1 - hit_rate))
        return Load(
            running=len(self.decoding) + len(self._stalled),
            waiting=len(self.waiting),
            waiting_tokens=self.waiting.tokens,
            waiting_uncached_tokens=uncached + sum(part.left for part in self._admission.parts),
            used_tokens=self.pool.used + growth,
            pool_tokens=self.model.pool_tokens,
            max_running_requests=self.model.max_running_requests,
            cache_hit_rate=self._admission.hits.last,
            generated_tokens=self.generated + growth,
            prefilled_tokens=self._prefilled_before + self._admission.prefilled,
            retracted=self._retractions.at(self.decoding.steps + steps),
            retracted_in_all=self.retracted,
        )

    # ---- time

    def _nominal(self, now: float) -> float:
        start, nominal = self._clock
        return nominal + (now - start) * self._speed

    def _catch_up(self, now: float) -> None:
        while self.next_event_at() < now:
            self._process()
        self._now = self._nominal(now)

    def _steps_done(self, now: float) -> int:
        """Return the complete steps of the current decode."""
        if self._admission.parts or not self.decoding:
            return 0
        elapsed = self._nominal(now) - self._began
        steps = self.decoding.steps_until(self.model, elapsed)
        return steps - 1 if steps and self.decoding.seconds(self.model, steps) > elapsed else steps

    def _interrupt(self) -> None:
        """End the current decode at the next step boundary; a prefill batch runs to its end."""
        if self._admission.parts:
            return
        if not self.decoding:
            self._until = min(self._until, self._now)
            self._planned = 0
            return
        steps = self.decoding.steps_until(self.model, self._now - self._began)
        if steps < self._planned:
            self._planned = steps
            self._until = self._began + self.decoding.seconds(self.model, steps)

    def _process(self) -> None:
        """Process the next event, and plan the one after it."""
        at = self._until
        if self._admission.parts:
            self._end_prefill()
        else:
            self._end_steps()
        self._plan(at)

    def _plan(self, at: float) -> None:
        self._began = at
        seconds = self._admission.begin(at, len(self._stalled))
        if seconds is not None:
            self._until = at + seconds
            return
        steps = self._room_to_decode()
        if not self.decoding:
            self._until = math.inf
            if not (self._stalled or self.waiting):
                self._admission.ratio.reset(self.decoding.steps)
            return
        self._planned = min(steps, self.decoding.next_milestone())
        self._until = at + self.decoding.seconds(self.model, self._planned)

    # ---- prefill

    def _end_prefill(self) -> None:
        self._retractions.prefilled(self.decoding.steps)
        for work in self._admission.end(starting=not self.decoding):
            if work in self._leaving:
                self._drop(work, work.private)
            else:
                self._join(work)
        self._end_leaving()

    def _join(self, work: Work) -> None:
        """Record that the prompt and the first token are computed."""
        self.pool.share(work)
        if work.stalls:
            self._stalled[work] = None
            return
        if work.written < work.target:
            work.written += 1
            self.generated += 1
        if work.written >= work.target:
            self.pool.release(work, work.private, keep=True)
            self._end(work)
            return
        self.decoding.join(work)
        if work.piece:
            self._woken.append(work)

    # ---- decode

    def _end_steps(self) -> None:
        steps, self._planned = self._planned, 0
        grown = steps * len(self.decoding)
        self.generated += grown
        self.pool.take(grown)
        for work in self.decoding.advance(steps):
            if work.written >= work.target:
                self.pool.release(work, self.decoding.remove(work), keep=True)
                self._end(work)
            else:
                self._woken.append(work)
        self._end_leaving()

    def _room_to_decode(self) -> int:
        """Return the steps for which the pool has room; retract requests if there is none for one step."""
        if not self.decoding:
            return 0
        steps = self.pool.available // len(self.decoding)
        if steps:
            return steps
        # Fewest generated tokens first, then the longest prompt, then the last to join.
        ranked = [*self._stalled, *self.decoding.batch]
        for work in self.decoding.batch:
            work.written = work.start + self.decoding.steps - work.joined
        ranked.sort(key=lambda work: (work.written, -work.tokens), reverse=True)
        out = 0
        while len(ranked) > 1 and (not out or self.pool.available < len(self.decoding)):
            self._retract(ranked.pop())
            out += 1
        self._admission.ratio.retracted(self.decoding.steps, list(self.decoding.batch))
        self.retracted += out
        self._retractions.retracted(self.decoding.steps, out)
        self._admission.full = False
        return 1

    def _retract(self, work: Work) -> None:
        """Move a request to the end of the queue; its tokens are computed again later."""
        if work in self._stalled:
            del self._stalled[work]
            private = work.private
        else:
            private = self.decoding.remove(work)
        self.pool.release(work, private, keep=False)
        work.retractions += 1
        self.waiting.add(work)

    # ---- end of requests

    def _cancel(self, work: Work) -> None:
        """End a request early."""
        if work.over or work in self._leaving:
            return
        work.aborted = True
        if work in self.waiting:
            self.waiting.remove(work)
            self._end(work)
        elif work in self._stalled:
            del self._stalled[work]
            self._drop(work, work.private)
            self._interrupt()
        else:
            self._leaving.append(work)
            self._interrupt()

    def _end_leaving(self) -> None:
        for work in self._leaving:
            if work in self.decoding.batch:
                self._drop(work, self.decoding.remove(work))
        self._leaving.clear()

    def _drop(self, work: Work, private: int) -> None:
        self.pool.release(work, private, keep=False)
        self._end(work)

    def _end(self, work: Work) -> None:
        work.over = True
        self._admission.full = False
        self._woken.append(work)


class BatchedEngine:
    """Runs a `Batching` on the clock of the running event loop, with one timer. See `Engine`."""

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
        # The timer processes the next event, so that requests of the same moment share a prefill.
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
        # Without a stream the first token is not awaited, which saves a turn of the loop.
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
        load = self.machine.load(_now())
        self._update()
        return load

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
        """Wake requests that made progress, and set the timer for the next event."""
        for work in self.machine.woken():
            settle(work)
        due = self.machine.next_event_at()
        if due == self._set_for:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = (
            None if due == math.inf else asyncio.get_running_loop().call_at(due, SPENT.of_call, self._fire)
        )
        self._set_for = due

    def _fire(self) -> None:
        # A loop may run a timer early by less than its clock's resolution: the event is due.
        due = max(_now(), self._set_for)
        self._timer, self._set_for = None, math.inf
        for work in self.machine.advance(due):
            settle(work)
        self._update()


def _now() -> float:
    return asyncio.get_running_loop().time()
