"""Whether more requests at a time still pay, told from the answers alone: a plain state machine.

How many requests a server may have at a time: plain state machines, with no clock of their own.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from streamsyn.fleet.wire import Load

_PAYS = 0.25
"""More in flight pays when the rate of tokens grows by at least this part of what the cap grew by."""
_SLOWER = 3.0
"""Answers that take so many times as long a token as in the quickest round, and no more of them."""
_QUICK = 2.0
_STEADY = 1.1
_BACK = 0.85
_TRY_EVERY = 4
"""Rounds between two tries to grow, once growing has not paid."""
_FORGET = 1.02
"""The quickest round counts a little less each time: servers and texts change."""


@dataclass(slots=True)
class ThroughputProbe:
    """Additive increase, multiplicative decrease on latency, for servers that do not tell their load.

    A round is as many answers as the cap allows requests. After each, the rate of tokens is held against
    that of the round before: by Little's law a server that is not full gives more tokens a second when
    it has more requests, a full one only makes each of them slower. Growth that did not pay is taken
    back, and tried again later by a little.
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
        """One more answer. At the end of a round, what to multiply the cap by; else None."""
        if self._began_at is None:
            self._began_at = now - seconds
        self._answers += 1
        self._tokens += max(1, tokens)
        self._seconds += seconds
        if self._answers < cap:
            return None
        rate = self._tokens / max(now - self._began_at, 1e-9)
        a_token = self._seconds / self._tokens
        verdict = self._verdict(rate, a_token, cap)
        self._cap, self._rate = cap, rate
        self._quickest = min(self._quickest * _FORGET, a_token)
        self._began_at, self._answers, self._tokens, self._seconds = now, 0, 0, 0.0
        return verdict

    def _verdict(self, rate: float, a_token: float, cap: int) -> float:
        if self._cap == 0:
            return _QUICK
        grown, faster = cap / self._cap - 1, rate / self._rate - 1
        if grown > 0 and faster < _PAYS * grown:
            self._is_ramping = False
            return self._cap / cap
        if a_token > _SLOWER * self._quickest and faster <= 0:
            self._is_ramping = False
            return _BACK
        if self._is_ramping:
            return _QUICK
        self._since_try = (self._since_try + 1) % _TRY_EVERY
        return 1.0 if self._since_try else _STEADY


_FIRST_HOLD_S = 0.1
_LONGEST_HOLD_S = 5.0
_SLOW_START = 1 / 8
"""Share of its cap that a server begins with when it is back."""

START = 8
FLOOR = 2
"""The adaptive cap begins with this, and never goes below that."""
_LONGEST_QUEUE = 32
"""Requests wanted in a server's queue at most. From 128 on SGLang's `lpm` no longer sorts it by prefix."""
_PRESSURE = 0.92
"""Share of the KV pool in use from which nothing is added: what runs still grows."""
_STALE_AFTER = 3.5
"""Readings are stale when so many have been missed."""
_CALM_S = 10.0
"""After a retraction or a full queue, no growth for so long."""


@dataclass(slots=True)
class Limiter:
    """A fixed cap, a hold after the server said that its queue is full, and a slow start.

    A full queue is backpressure: no request fails by it, the server just gets nothing new for a
    while, twice as long each time until it answers again.
    """

    cap: int
    slow_start_s: float = 0.0
    in_flight: int = 0
    held_until: float = 0.0
    decisions: Counter[str] = field(default_factory=Counter)
    """How often the cap was moved, by the reason."""
    last_decision: str = ""
    _next_hold_s: float = _FIRST_HOLD_S
    _back_since: float | None = None

    def room(self, now: float) -> int:
        """How many more requests may go out."""
        return 0 if now < self.held_until else self.cap_at(now) - self.in_flight

    def has_room(self, now: float) -> bool:
        """Whether one more request may go out."""
        return self.room(now) > 0

    def next_room_at(self, now: float) -> float | None:
        """When there may be room though nothing is given back; None when there will be none."""
        if now < self.held_until:
            return self.held_until
        if self._back_since is None:
            return None
        return now + _SLOW_START * self.slow_start_s

    def cap_at(self, now: float) -> int:
        """The cap, less what a server that is just back is spared."""
        if self._back_since is None:
            return self.cap
        share = (now - self._back_since) / self.slow_start_s if self.slow_start_s else 1.0
        if share >= 1:
            self._back_since = None
            return self.cap
        return max(1, int(self.cap * max(share, _SLOW_START)))

    def busy(self, now: float, jitter: float) -> bool:
        """The server refused a request because its queue is full. `jitter` is drawn from [0, 1).

        False for one of those that were under way when the first one came back.
        """
        if now < self.held_until:
            return False
        self.held_until = now + self._next_hold_s * (0.5 + 0.5 * jitter)
        self._next_hold_s = min(2 * self._next_hold_s, _LONGEST_HOLD_S)
        return True

    def answered(self, now: float, seconds: float, tokens: int) -> None:  # noqa: ARG002 - the other one asks
        """The server answered a request with so many tokens in so many seconds."""
        self._next_hold_s = _FIRST_HOLD_S

    def scored(self, now: float, seconds: float, tokens: int) -> None:  # noqa: ARG002 - the other one asks
        """The server scored an answer, and computed so many tokens of its prompt for that."""
        self._next_hold_s = _FIRST_HOLD_S

    def failed(self) -> None:
        """A request brought no answer, for whatever reason."""

    def observe(self, load: Load, now: float) -> None:
        """A reading of the server's load has come."""

    @property
    def is_looking(self) -> bool:
        """Whether readings are wanted in quick succession."""
        return False

    def readmitted(self, now: float) -> None:
        """The server is back after it was ejected; `in_flight` is what it still owes."""
        self._back_since = now


@dataclass(slots=True)
class AdaptiveLimiter(Limiter):
    """Finds the cap that keeps a server's batch full, with a short queue before it.

    While readings of the server's load come, the cap follows them: as long as nothing waits it doubles
    at each reading (once a queue was seen: it grows by little), a queue that is longer than wanted is
    taken off it, and a retraction or KV pressure stops or reverts growth. When they are missing or stale
    the cap is moved by what answers cost (`Rounds`). Either way a failed request is no reason to grow:
    after one, there is no growth before the next answer.

    Idea of a cap that follows the engine's own figures: prime-rl's orchestrator, which does it for vLLM.
    """

    cap: int = START
    ceiling: int = 2048
    interval_s: float = 1.0
    _ramping: bool = True
    _bound: bool = False
    """Whether the cap has kept a request waiting since the last reading."""
    _short: int = 0
    """Readings in a row that found nothing waiting."""
    _credit: bool = True
    """Whether an answer has come since the last failure."""
    _calm_until: float = 0.0
    _read_at: float | None = None
    _last: Load | None = None
    _rounds: ThroughputProbe = field(default_factory=ThroughputProbe)
    _writes: bool = False
    """Whether it has given answers, and not only scored some."""

    def room(self, now: float) -> int:
        """See Limiter."""
        room = Limiter.room(self, now)
        self._bound = self._bound or room <= 1
        return room

    def busy(self, now: float, jitter: float) -> bool:
        """See Limiter; the first of a salvo also lowers the cap."""
        if not Limiter.busy(self, now, jitter):
            return False
        self._ramping = False
        self._calm_until = now + _CALM_S
        self._move(min(self.cap, self.in_flight) * 0.85, "queue_full")
        return True

    def answered(self, now: float, seconds: float, tokens: int) -> None:
        """See Limiter; without fresh readings, this is what the cap goes by."""
        Limiter.answered(self, now, seconds, tokens)
        self._credit = True
        if not self._writes:
            self._writes, self._rounds = True, ThroughputProbe()
        self._judge(now, seconds, tokens)

    def scored(self, now: float, seconds: float, tokens: int) -> None:
        """See Limiter; a scored request writes nothing, so beside answers it is no measure of a server."""
        Limiter.scored(self, now, seconds, tokens)
        self._credit = True
        if not self._writes:
            self._judge(now, seconds, tokens)

    def _judge(self, now: float, seconds: float, tokens: int) -> None:
        """Move the cap by what answers cost, where the server does not tell its load."""
        if self._is_fresh(now):
            return
        verdict = self._rounds.answered(now, seconds, tokens, self.cap)
        if verdict is None:
            return
        may_grow = self._bound and now >= self._calm_until
        self._bound = False
        if verdict > 1 and may_grow:
            self._move(max(self.cap * verdict, self.cap + 1), "pays")
        elif verdict < 1:
            self._move(self.cap * verdict, "latency")

    def failed(self) -> None:
        """See Limiter."""
        self._credit = False

    def observe(self, load: Load, now: float) -> None:
        """See Limiter."""
        if self._last is not None and load.taken_at is not None and load.taken_at == self._last.taken_at:
            return  # the server says what it said before: no news, and stale after a while
        before, self._last, self._read_at = self._last, load, now
        wanted = self._wanted_queue(load)
        if load.waiting:
            self._short = 0
        if load.retracted and (before is None or load.retracted != before.retracted or load.waiting):
            self._ramping = False
            self._calm_until = now + _CALM_S
            self._move(min(self.cap, load.running + wanted) * 0.9, "retraction")
        elif load.waiting > 2 * wanted:
            self._ramping = False
            excess = load.waiting - wanted
            self._move(max(self.in_flight - excess, self.cap * 0.7, load.running), "long_queue")
        elif load.waiting >= max(1, wanted // 2):
            self._ramping = False  # as it should be
        elif self._may_grow(load, now):
            self._grow(load, wanted)
        self._bound = self.in_flight >= self.cap

    @property
    def is_looking(self) -> bool:
        """See Limiter: as long as the cap doubles."""
        return self._ramping and self.cap < self.ceiling

    def readmitted(self, now: float) -> None:
        """See Limiter; what was known of the server may be wrong now."""
        Limiter.readmitted(self, now)
        self._ramping, self._credit, self._bound = True, True, False
        self._last = self._read_at = None
        self._rounds = ThroughputProbe()
        self._move(min(self.cap, START), "readmitted")

    def _may_grow(self, load: Load, now: float) -> bool:
        return self._bound and self._credit and now >= self._calm_until and load.token_usage < _PRESSURE

    def _grow(self, load: Load, wanted: int) -> None:
        if not self._ramping:
            # By no more than what the queue lacks; if that never shows in the queue, by ever more.
            step = max(1, wanted // 2) * 2 ** min(self._short, 4)
            self._short += 1
            self._move(self.cap + min(step, max(1, wanted // 2, self.cap // 4)), "short_queue")
            return
        bounds: list[float] = [2.0 * self.cap]
        if load.max_running:
            bounds.append(load.max_running + self._wanted_queue(load, load.max_running))
        if load.token_usage > 0.3:  # what runs now takes so much; it will grow
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
            self.decisions[why] += 1
            self.last_decision = why


def total_cap(limiters: Iterable[Limiter]) -> int:
    """Requests that may be in flight at all servers together."""
    return sum(limiter.cap for limiter in limiters)
