"""What failures lead to: a retry, a held or ejected server, a run that gives up. Plain state machines."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from streamsyn.config.sections import FleetSection
from streamsyn.errors import RateLimited, RequestRefused, ServerBusy, ServerError, ServerUnreachable
from streamsyn.fleet.transport import MAX_RETRY_AFTER_S

_OWN_AFTER = 3
"""A request has a rate limit of its own after this many refusals with other answers in between."""
_IN_A_ROW = 4
"""Refusals in a row, of whichever requests, that show that the server has too many."""
_WARN_EVERY_S = 300.0
_ACCEPTED_AFTER_S = 10.0
"""A refusal comes within this time: a request in flight for longer was accepted."""


@dataclass(slots=True)
class RetryBudget:
    """The tries and seconds that one request may use.

    A full queue or an unreachable server costs no try, since the request was not accepted. So a request
    survives an outage of the whole fleet, and many servers that fail one after the other. A request that is
    rate-limited again and again while others are answered gives up after `fleet.give_up_s`.
    """

    fleet: FleetSection
    rng: Random
    tries: int = 0
    spent_s: float = 0.0
    limited: int = 0
    """Refusals by rate limits."""
    own: int = 0
    """Of these, refusals after which only this request waited: others were answered, or none was left."""
    own_s: float = 0.0
    """Seconds before these refusals, each since the one before."""
    is_one_of_many: bool = False
    """Whether more requests have limits of their own than there are places."""
    _limited_at: float = 0.0
    _answers: int = 0

    @property
    def has_own_limit(self) -> bool:
        """Whether servers refuse this request while they answer others."""
        return self.own >= _OWN_AFTER

    def rate_limited(self, now: float, answers: int, *, others_are: bool) -> None:
        """Record a refusal by a rate limit.

        Args:
            now: Seconds of the event loop.
            answers: Answers of the fleet since its start.
            others_are: Whether requests without a limit of their own have been refused since the last answer.
        """
        if self.limited and (answers > self._answers or (self.has_own_limit and not others_are)):
            self.own += 1
            self.own_s += now - self._limited_at
        self.limited += 1
        self._limited_at, self._answers = now, answers

    def pause_after(self, error: ServerError, seconds: float) -> float | None:
        """Return the pause in seconds before the next try, after one that took `seconds`; None to give up."""
        self.spent_s += seconds
        if isinstance(error, RateLimited):
            return self._pause_after_limit(error)
        if isinstance(error, ServerBusy | ServerUnreachable):
            return 0.0  # placement does the waiting: the server is held or ejected
        self.tries += 1
        if isinstance(error, RequestRefused) or self.tries >= self.fleet.max_attempts:
            return None
        pause_s = full_jitter(self.fleet.backoff_base_s, self.fleet.backoff_max_s, self.tries - 1, self.rng)
        self.spent_s += pause_s
        return pause_s if self.spent_s < self.fleet.total_timeout_s else None

    def _pause_after_limit(self, error: RateLimited) -> float | None:
        if self.own_s > min(self.fleet.give_up_s, self.fleet.total_timeout_s):
            return None
        if self.is_one_of_many and self.own >= self.fleet.max_attempts:
            return None  # they would hold all workers
        if error.retry_after_s is None:
            step = self.limited - 1
            return full_jitter(self.fleet.backoff_base_s, self.fleet.backoff_max_s, step, self.rng)
        # All requests wait for the server together, unless the limit is this request's own.
        return error.retry_after_s if self.has_own_limit else 0.0


def full_jitter(base_s: float, longest_s: float, step: int, rng: Random) -> float:
    """Return a pause in seconds, drawn evenly from zero to an exponentially growing bound.

    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    return rng.uniform(0, min(longest_s, base_s * 2 ** min(step, 30)))


@dataclass(slots=True)
class Health:
    """Whether a server is ejected: after `eject_after` failures in a row, or one failed connection."""

    eject_after: int
    ejected: bool = False
    failures: int = 0
    ejections: int = 0
    """Ejections since the last answer: a server may answer probes and nothing else."""

    def answered(self) -> None:
        """Record an answer of any kind: the server is alive."""
        self.failures = self.ejections = 0

    def failed(self, *, reachable: bool = True) -> bool:
        """Record a request without an answer. Return True when this ejects the server."""
        self.failures += 1
        if self.ejected or (reachable and self.failures < self.eject_after):
            return False
        self.ejected = True
        self.ejections += 1
        return True

    def readmit(self) -> None:
        """Record that a probe was answered."""
        self.ejected = False
        self.failures = 0


@dataclass(slots=True)
class RateLimit:
    """What the 429s of a server mean: one refused request waits by itself, several in a row hold it."""

    in_a_row: int = 0
    _warned_at: float | None = None

    def answered(self) -> None:
        """Record an answer."""
        self.in_a_row = 0

    def refused(self, cap: int) -> bool:
        """Record a refusal. Return whether the server has more requests than it takes."""
        self.in_a_row += 1
        return self.in_a_row >= max(_IN_A_ROW, cap // 8)

    def take_warning(self, now: float) -> bool:
        """Return whether a warning is due, at the first refusal and every five minutes; it is then given."""
        if self._warned_at is not None and now - self._warned_at < _WARN_EVERY_S:
            return False
        self._warned_at = now
        return True


class Outage:
    """Gives up on a fleet that has had no usable server, or has refused all requests, for too long.

    Args:
        section: Has `give_up_s` and `request_timeout_s`.
        on_gone: Called with the reason when the fleet is given up; None never gives up.
    """

    def __init__(self, section: FleetSection, on_gone: Callable[[str], None] | None) -> None:
        self._section = section
        self._on_gone = on_gone
        self._timer: asyncio.TimerHandle | None = None
        self._gone_since: float | None = None
        self._refusal_timer: asyncio.TimerHandle | None = None
        self._is_refused = False
        self._refusal = ""
        self._refused_since = self._paused_until = self._paused_s = 0.0
        self._tries: dict[str, float] = {}
        """When each request in flight was sent, by rid, in order."""

    def sent(self, rid: str, now: float) -> None:
        """Record that a request was sent; `done` ends it."""
        self._tries[rid] = now

    def done(self, rid: str) -> None:
        """Record that a request is no longer in flight."""
        del self._tries[rid]

    def answered(self) -> None:
        """Record that a request was answered."""
        self._gone_since, self._is_refused = None, False
        if self._refusal_timer is not None:
            self._refusal_timer.cancel()
            self._refusal_timer = None

    def began(self, loop: asyncio.AbstractEventLoop) -> None:
        """Record that some model has no usable server.

        The time counts from the first such moment since the last answer.
        """
        if self._timer is not None or self._on_gone is None:
            return
        if self._gone_since is None:
            self._gone_since = loop.time()
        give_up_s = self._section.give_up_s
        reason = f"no server was usable for fleet.give_up_s = {give_up_s:g} s"
        self._timer = loop.call_at(self._gone_since + give_up_s, self._on_gone, reason)

    def ended(self) -> None:
        """Record that each model has a usable server again; only an answer resets the time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def refused(self, loop: asyncio.AbstractEventLoop, message: str, pause_s: float = 0.0) -> None:
        """Record that a server had no room for a request.

        Args:
            loop: The event loop.
            message: The server's answer.
            pause_s: The pause in seconds that it asks for.
        """
        self._is_refused = True
        if self._on_gone is None:
            return
        self._refusal, now = message, loop.time()
        if self._refusal_timer is None:
            self._refused_since, self._paused_until, self._paused_s = now, now, 0.0
            give_up_at = now + self._section.give_up_s
            self._refusal_timer = loop.call_at(give_up_at, self._give_up, loop, self._on_gone)
        begins, ends = max(now, self._paused_until), now + pause_s
        if ends > begins:
            self._paused_s += ends - begins
            self._paused_until = ends

    def gives_up_in_s(self, now: float) -> float | None:
        """Return the seconds until the fleet is given up; None if a server is usable and does not refuse."""
        timers = [self._timer]
        if now - self._refused_since >= _ACCEPTED_AFTER_S:  # before, it may pass
            timers.append(self._refusal_timer)
        return min((timer.when() - now for timer in timers if timer is not None), default=None)

    @property
    def is_refused(self) -> bool:
        """Whether requests have been refused since the last answer."""
        return self._is_refused

    def close(self) -> None:
        """Cancel the timers."""
        self.ended()
        self.answered()

    def _give_up(self, loop: asyncio.AbstractEventLoop, on_gone: Callable[[str], None]) -> None:
        """Give up, unless a server asked for more time, or may still answer a request that it accepted."""
        give_up_s, now = self._section.give_up_s, loop.time()
        ends = self._refused_since + give_up_s + min(self._paused_s, MAX_RETRY_AFTER_S)
        oldest = next(iter(self._tries.values()), now)
        if now - oldest > min(_ACCEPTED_AFTER_S, give_up_s / 2):
            ends = max(ends, oldest + self._section.request_timeout_s, now + _ACCEPTED_AFTER_S)
        if ends > now:
            self._refusal_timer = loop.call_at(ends, self._give_up, loop, on_gone)
            return
        on_gone(f"every request was refused for fleet.give_up_s = {give_up_s:g} s: {self._refusal}")
