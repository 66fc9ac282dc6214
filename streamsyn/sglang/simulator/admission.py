from dataclasses import dataclass
from typing import Final

from streamsyn.sglang.simulator.costs import CostModel
from streamsyn.sglang.simulator.engine import Work
from streamsyn.sglang.simulator.lockstep import Lockstep, remaining
from streamsyn.sglang.simulator.pool import KVPool
from streamsyn.sglang.simulator.queueing import WaitingQueue
from streamsyn.sglang.simulator.reserve import HitRate, NewTokenRatio


@dataclass(slots=True)
class Part:
    """What one prefill batch computes of a request: `new` tokens that follow `before` others."""

    work: Work
    before: int
    new: int

    @property
    def left(self) -> int:
        """Tokens that are not computed when this part is."""
        return self.work.tokens + self.work.written - self.before - self.new


def room_alone(model: CostModel, work: Work) -> int:
    """New tokens for which the pool has room when nobody else is in it."""
    return model.pool_tokens - work.tokens - 2


class Admission:
    """Who of the waiting requests is prefilled next, and how much of it at once.

    As PrefillAdder (srt/managers/schedule_policy.py) without priorities: a request needs a seat in the batch
    and room for what it has to compute and all that it may write, beside a share of what the running ones may
    still write. The first that does not fit closes the door for all until somebody leaves the batch.
    """

    def __init__(self, model: CostModel, pool: KVPool, waiting: WaitingQueue, decoding: Lockstep) -> None:
        self.parts: list[Part] = []
        """The prefill batch under way."""
        self.full = False
        self.prefilled = 0
        """Tokens computed since the start."""
        self.ratio: Final = NewTokenRatio()
        self.hits: Final = HitRate()
        self._model = model
        self._pool = pool
        self._waiting = waiting
        self._decoding = decoding
        self._chunked: Part | None = None

    def begin(self, now: float, stalled: int) -> float | None:
        """Puts the next prefill batch together: how many seconds it takes, None if there is none."""
        budget = self._model.prefill_tokens
        if self._chunked is not None:
            cut, self._chunked = self._chunked, None
            budget -= self._add(cut.work, cut.before + cut.new, budget)
        if self._waiting and not self.full:
            self._waiting.sort(self._pool.cache)
            self._fill(budget, now, stalled)
        if not self.parts:
            return None
        return self._model.prefill((part.before, part.new) for part in self.parts)

    def end(self, *, starting: bool) -> list[Work]:
        """The prefill batch is computed; requests that are through. `starting`: nobody was decoding."""
        parts, self.parts = self.parts, []
        if starting:  # it becomes the running batch, and that one is not full yet
            self.full = False
        through = []
        for part in parts:
            if part.left and not part.work.aborted:
                self._chunked = part
            else:
                through.append(part.work)
        return through

    def _fill(self, budget: int, now: float, stalled: int) -> None:
        seats = self._model.max_running_requests - len(self._decoding) - stalled - len(self.parts)
        promised = self.ratio.at(self._decoding.steps) * self._decoding.reserve
        while self._waiting and budget > 0:
            work = self._waiting.first
            self._clip(work)
            new = work.tokens + work.written - self._pool.lock(work)
            wanted = remaining(work, work.written) + 1
            if seats <= 0 or promised + new + wanted >= self._pool.available:
                self._pool.unlock(work)
                self.full = bool(self.parts or self._decoding or stalled)
                return
            seats -= 1
            promised += wanted
            self._waiting.remove(work)
            work.running = True
            if not work.retractions:
                work.cached_tokens = work.locked
                self.hits.add(now, work.locked, new)
            self.prefilled += new
            self._pool.take(new)
            work.private = new
            budget -= self._add(work, work.locked, budget)

    def _add(self, work: Work, before: int, budget: int) -> int:
        """Adds as much of a request as fits to the batch; says how much that was."""
        new = min(budget, work.tokens + work.written - before)
        self.parts.append(Part(work, before, new))
        return new

    def _clip(self, work: Work) -> None:
        """No request may write more than fits when it is alone, as in the real server."""
        room = room_alone(self._model, work)
        work.target = min(work.target, room)
        asked = room if work.max_new_tokens is None else min(work.max_new_tokens, room)
        work.max_new_tokens = max(work.target, asked)
