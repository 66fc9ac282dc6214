"""How many requests a server may have in flight: a fixed cap, or one that adapts to the server's load.

An adaptive cap follows what limits the server. Where the KV pool does, it is what the pool holds (`kv_pool`),
and requests that ended are replaced several at a time: each prefill batch stops the decode of all others.
Where the number of seats in the batch does, it keeps a short queue behind a full batch. Without load metrics
it follows throughput and latency.

Plain state machines: no I/O and no clock of their own. `now` is always in seconds of one monotonic clock. A
query (`room`, `has_room`, `next_room_at`, `cap_at`, `is_ramping`) changes nothing.
"""

from collections import Counter
from dataclasses import dataclass, field
from math import inf

from streamsyn.fleet.kv_pool import NOTHING, Expected, Footprint, PoolCap
from streamsyn.fleet.wire import Load
from streamsyn.records import Completion

START = 8
"""Where an adaptive cap starts."""
FLOOR = 2
"""Lower bound of an adaptive cap."""

_FIRST_HOLD_S = 0.1
_LONGEST_HOLD_S = 5.0
_SLOW_START = 1 / 8
"""Share of its cap that a readmitted server starts with."""
_LONGEST_QUEUE = 32
"""Longest queue to aim for at a server. From 128 on SGLang's `lpm` no longer sorts its queue by prefix."""
_PRESSURE = 0.92
"""Share of the KV pool in use from which the cap does not grow: running requests still need more."""
_STALE_AFTER = 3.5
"""Load metrics are stale after this many missed intervals."""
_CALM_S = 10.0
"""No growth for this long after a retraction or a full queue."""
_AT_ONCE = 1 / 40
"""Share of the cap that ended requests must free before they are replaced, where the KV pool is the limit.

While places wait, at most this share is missing in the batch, half of it on average. While they are filled
one by one, a prefill batch follows almost each decode step of a server with short answers: of its costs alone
(8 ms on an H100) that is an eighth of the time. The best share is near sqrt(4 * cost / seconds of an answer),
which is 1/30 for answers that take 28 s and 1/57 for 105 s; between 1/64 and 1/32 little depends on it."""


@dataclass(slots=True)
class Limiter:
    """A fixed cap, with a hold after a full queue and a slow start after readmission.

    A full queue is backpressure: no request fails by it. The server gets no new requests for a while, twice
    as long each time until it answers again.
    """

    cap: int
    slow_start_s: float = 0.0
    in_flight: int = 0
    held_until: float = 0.0
    decisions: Counter[str] = field(default_factory=Counter)
    """How often the cap was changed, by reason."""
    last_decision: str = ""
    _next_hold_s: float = _FIRST_HOLD_S
    _back_since: float | None = None

    def begin(self, footprint: Footprint, now: float) -> Expected:  # noqa: ARG002 - AdaptiveLimiter uses them
        """Count a request as in flight. Return what it is expected to hold at the server, for `end`."""
        self.in_flight += 1
        return NOTHING

    def end(self, expected: Expected) -> None:  # noqa: ARG002 - AdaptiveLimiter uses it
        """Undo `begin`: the request is not in flight any more."""
        self.in_flight -= 1

    def room(self, now: float) -> int:
        """Return how many more requests may be sent."""
        return 0 if now < self.held_until else self.cap_at(now) - self.in_flight

    def has_room(self, now: float) -> bool:
        """Whether another request may be sent."""
        return self.room(now) > 0

    def next_room_at(self, now: float) -> float | None:
        """Return when there may be room without a release; None when there will be none."""
        if now < self.held_until:
            return self.held_until
        return now + _SLOW_START * self.slow_start_s if self._start_share(now) < 1 else None

    def cap_at(self, now: float) -> int:
        """Return the cap, reduced during a slow start."""
        share = self._start_share(now)
        return self.cap if share >= 1 else max(1, int(self.cap * max(share, _SLOW_START)))

    def _start_share(self, now: float) -> float:
        """Return the part of a slow start that has passed; 1 if there is none."""
        if self._back_since is None or not self.slow_start_s:
            return 1.0
        return (now - self._back_since) / self.slow_start_s

    def busy(self, now: float, jitter: float) -> bool:
        """Record that the server refused a request because its queue is full; `jitter` is in [0, 1).

        Return False for a request that was sent before the current hold began.
        """
        if now < self.held_until:
            return False
        self.held_until = now + self._next_hold_s * (0.5 + 0.5 * jitter)
        self._next_hold_s = min(2 * self._next_hold_s, _LONGEST_HOLD_S)
        return True

    def hold(self, until: float) -> None:
        """Send nothing before `until`: the server has asked for a pause."""
        self.held_until = max(self.held_until, until)

    def answered(self, now: float, seconds: float, tokens: int) -> None:  # noqa: ARG002 - AdaptiveLimiter uses them
        """Record an answer of `tokens` tokens that took `seconds`."""
        self._next_hold_s = _FIRST_HOLD_S

    def learn(self, footprint: Footprint, completion: Completion) -> None:
        """Record what an answer shows about the prompts and answers to come."""

    def scored(self, now: float, seconds: float, tokens: int) -> None:  # noqa: ARG002 - AdaptiveLimiter uses them
        """Record a scored request that took `seconds` and computed `tokens` uncached prompt tokens."""
        self._next_hold_s = _FIRST_HOLD_S

    def failed(self) -> None:
        """Record a request that failed for any reason but a full queue."""

    def observe(self, load: Load, now: float, left: float = inf) -> None:
        """Record the server's load metrics, and how many requests it may still get, if that is known."""

    @property
    def is_ramping(self) -> bool:
        """Whether load metrics should be read more often."""
        return False

    def readmitted(self, now: float) -> None:
        """Record that the server was readmitted; requests from before may still be in flight."""
        self._back_since = now


_PAYS = 0.25
"""A larger cap pays off if tokens/s grow by at least this part of the cap's growth."""
_SLOWER = 3.0
"""With this many times the time per token of the quickest round, and no more tokens/s, the cap shrinks."""
_RAMP = 2.0
_STEP = 1.1
_SHRINK = 0.85
"""Factors of the cap: while it ramps up, for a later try to grow, and on high latency."""
_TRY_EVERY = 4
"""Rounds between two tries to grow, once growth has not paid off."""
_FORGET = 1.02
"""Growth of the quickest time per token with each round, since servers and texts change."""


@dataclass(slots=True)
class ThroughputProbe:
    """Adapts a cap to throughput and latency, for servers without load metrics.

    A round is as many answers as the cap. After each round its tokens/s are compared with the round before:
    by Little's law a server that is not full yields more tokens/s with more requests, and a full one only
    gets slower. Growth that does not pay off is reverted, and later tried again in smaller steps.
    """

    _began_at: float | None = None
    _answers: int = 0
    _tokens: int = 0
    _seconds: float = 0.0
    _cap: int = 0
    _rate: float = 0.0
    _quickest: float = field(default=float("inf"))
    _is_ramping: bool = True
    _since_try: int = 0

    def answered(self, now: float, seconds: float, tokens: int, cap: int) -> float | None:
        """Record an answer. At the end of a round, return the factor to multiply the cap by; else None."""
        if self._began_at is None:
            self._began_at = now - seconds
        self._answers += 1
        self._tokens += max(1, tokens)
        self._seconds += seconds
        if self._answers < cap:
            return None
        rate = self._tokens / max(now - self._began_at, 1e-9)
        token_s = self._seconds / self._tokens
        factor = self._factor(rate, token_s, cap)
        self._cap, self._rate = cap, rate
        self._quickest = min(self._quickest * _FORGET, token_s)
        self._began_at, self._answers, self._tokens, self._seconds = now, 0, 0, 0.0
        return factor

    def _factor(self, rate: float, token_s: float, cap: int) -> float:
        if self._cap == 0:
            return _RAMP
        grown, faster = cap / self._cap - 1, rate / self._rate - 1
        if grown > 0 and faster < _PAYS * grown:
            self._is_ramping = False
            return self._cap / cap
        if token_s > _SLOWER * self._quickest and faster <= 0:
            self._is_ramping = False
            return _SHRINK
        if self._is_ramping:
            return _RAMP
        self._since_try = (self._since_try + 1) % _TRY_EVERY
        return 1.0 if self._since_try else _STEP


@dataclass(slots=True)
class AdaptiveLimiter(Limiter):
    """A cap that keeps the server's batch full, with a short queue before it.

    With load metrics, the cap follows them. Where the KV pool limits the batch, `PoolCap` decides. Elsewhere,
    as long as no request waits at the server the cap doubles at each reading, or grows in small steps once a
    queue was seen. A queue that is too long is subtracted from it. A retraction or KV pressure stops or
    reverts growth. Without load metrics, or when they are stale, the cap follows throughput and latency
    (`ThroughputProbe`). A failure stops growth until the next answer.

    Source of the idea: prime-rl's orchestrator, whose cap follows vLLM's metrics.
    """

    cap: int = START
    ceiling: int = 2048
    interval_s: float = 1.0
    _ramping: bool = True
    _cap_reached: bool = False
    """Whether the cap has been reached since the last reading."""
    _steps: int = 0
    """Steps of growth in a row without a queue."""
    _may_grow_again: bool = True
    """False between a failure and the next answer."""
    _calm_until: float = 0.0
    _read_at: float | None = None
    _last: Load | None = None
    _probe: ThroughputProbe = field(default_factory=ThroughputProbe)
    _has_generated: bool = False
    """Whether the server has generated text, and not only scored some."""
    _is_pool_bound: bool = False
    """Whether the KV pool is the limit, as of the last reading."""
    _is_filling: bool = True
    """Whether free places are filled."""
    _pool: PoolCap = field(default_factory=PoolCap)

    def begin(self, footprint: Footprint, now: float) -> Expected:
        """See Limiter."""
        self.in_flight += 1
        self._cap_reached = self._cap_reached or self.in_flight >= self.cap_at(now)
        self._look_at_places()
        return self._pool.begin(footprint)

    def end(self, expected: Expected) -> None:
        """See Limiter."""
        self.in_flight -= 1
        self._pool.end(expected)
        self._look_at_places()

    def room(self, now: float) -> int:
        """See Limiter. None while too few of its places are free (`_AT_ONCE`)."""
        room = Limiter.room(self, now)
        return room if self._is_filling else min(0, room)

    def _look_at_places(self) -> None:
        """Begin to fill the free places if they are enough, and stop when none is left."""
        free = self.cap - self.in_flight
        enough = max(1, int(_AT_ONCE * self.cap)) if self._is_pool_bound else 1
        self._is_filling = free >= enough or (self._is_filling and free > 0)

    def learn(self, footprint: Footprint, completion: Completion) -> None:
        """See Limiter."""
        self._pool.learn(footprint, completion)

    def busy(self, now: float, jitter: float) -> bool:
        """See Limiter. The first refusal of a burst also lowers the cap."""
        if not Limiter.busy(self, now, jitter):
            return False
        self._ramping = False
        self._calm_until = now + _CALM_S
        self._move(min(self.cap, self.in_flight) * 0.85, "queue_full")
        return True

    def answered(self, now: float, seconds: float, tokens: int) -> None:
        """See Limiter. Without fresh load metrics the cap follows the answers."""
        Limiter.answered(self, now, seconds, tokens)
        self._may_grow_again = True
        if not self._has_generated:
            self._has_generated, self._probe = True, ThroughputProbe()
        self._follow_throughput(now, seconds, tokens)

    def scored(self, now: float, seconds: float, tokens: int) -> None:
        """See Limiter. Scored requests generate nothing, so they count only where there are no answers."""
        Limiter.scored(self, now, seconds, tokens)
        self._may_grow_again = True
        if not self._has_generated:
            self._follow_throughput(now, seconds, tokens)

    def _follow_throughput(self, now: float, seconds: float, tokens: int) -> None:
        """Set the cap by throughput and latency, unless there are fresh load metrics."""
        if self._is_fresh(now):
            return
        factor = self._probe.answered(now, seconds, tokens, self.cap)
        if factor is None:
            return
        may_grow = (self._cap_reached or self.in_flight >= self.cap) and now >= self._calm_until
        self._cap_reached = False
        if factor > 1 and may_grow:
            self._move(max(self.cap * factor, self.cap + 1), "pays")
        elif factor < 1:
            self._move(self.cap * factor, "latency")

    def failed(self) -> None:
        """See Limiter."""
        self._may_grow_again = False

    def observe(self, load: Load, now: float, left: float = inf) -> None:
        """See Limiter."""
        if self._last is not None and load.taken_at is not None and load.taken_at == self._last.taken_at:
            return  # the same reading again; stale after a while
        before, self._last, self._read_at = self._last, load, now
        self._cap_reached = self._cap_reached or self.in_flight >= self.cap
        pool_cap = self._pool.cap(load, left)
        self._is_pool_bound = pool_cap is not None
        if pool_cap is None:
            self._follow_queue(load, before, now)
        else:
            self._ramping = pool_cap < self._pool.level / 2
            self._move(pool_cap if now >= self._calm_until else min(self.cap, pool_cap), "kv_pool")
        self._cap_reached = self.in_flight >= self.cap
        self._look_at_places()

    def _follow_queue(self, load: Load, before: Load | None, now: float) -> None:
        """Set the cap by the server's queue, and by its retractions since the reading `before`."""
        wanted = self._wanted_queue(load)
        if load.waiting:
            self._steps = 0
        if load.retracted and (before is None or load.retracted != before.retracted or load.waiting):
            self._ramping = False
            self._calm_until = now + _CALM_S
            self._move(min(self.cap, load.running + wanted) * 0.9, "retraction")
        elif load.waiting > 2 * wanted:
            self._ramping = False
            excess = load.waiting - wanted
            self._move(max(self.in_flight - excess, self.cap * 0.7, load.running), "long_queue")
        elif load.waiting >= max(1, wanted // 2):
            self._ramping = False  # the queue is as long as wanted
        elif self._may_grow(load, now):
            self._grow(load, wanted)

    @property
    def is_ramping(self) -> bool:
        """See Limiter: true as long as the cap doubles."""
        return self._ramping and self.cap < self.ceiling

    def readmitted(self, now: float) -> None:
        """See Limiter. The cap starts again, since the server may have changed."""
        Limiter.readmitted(self, now)
        self._ramping, self._may_grow_again, self._cap_reached = True, True, False
        self._last = self._read_at = None
        self._probe = ThroughputProbe()
        self._move(min(self.cap, START), "readmitted")

    def _may_grow(self, load: Load, now: float) -> bool:
        return (
            self._cap_reached
            and self._may_grow_again
            and now >= self._calm_until
            and load.token_usage < _PRESSURE
        )

    def _grow(self, load: Load, wanted: int) -> None:
        if not self._ramping:
            # By what the queue lacks; by more and more if no queue forms.
            step = max(1, wanted // 2) * 2 ** min(self._steps, 4)
            self._steps += 1
            self._move(self.cap + min(step, max(1, wanted // 2, self.cap // 4)), "short_queue")
            return
        bounds: list[float] = [2.0 * self.cap]
        if load.max_running:
            bounds.append(load.max_running + self._wanted_queue(load, load.max_running))
        if load.token_usage > 0.3:  # enough to extrapolate from
            bounds.append(max(load.running * _PRESSURE / load.token_usage, self.cap + 1.0))
        self._move(min(bounds), "ramp")

    def _wanted_queue(self, load: Load, running: int | None = None) -> int:
        return min(_LONGEST_QUEUE, max(2, (load.running if running is None else running) // 8))

    def _is_fresh(self, now: float) -> bool:
        return self._read_at is not None and now - self._read_at < _STALE_AFTER * self.interval_s

    def _move(self, cap: float, why: str) -> None:
        moved = max(min(FLOOR, self.ceiling), min(self.ceiling, int(cap)))
        if moved != self.cap:
            self.cap = moved
            self._look_at_places()
            self.decisions[why] += 1
            self.last_decision = why
