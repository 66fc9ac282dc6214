"""What failures lead to: a retry, an ejected server, a run that gives up. Three plain state machines."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from streamsyn.config.sections import FleetSection
from streamsyn.errors import RequestRefused, ServerBusy, ServerError, ServerUnreachable


@dataclass(slots=True)
class RetryBudget:
    """The tries and seconds that one request may use.

    A full queue or an unreachable server costs no try, since the request was not accepted. So a request
    survives an outage of the whole fleet, and many servers that fail one after the other.
    """

    fleet: FleetSection
    rng: Random
    tries: int = 0
    spent_s: float = 0.0

    def pause_after(self, error: ServerError, seconds: float) -> float | None:
        """Return the pause in seconds before the next try, after one that took `seconds`; None to give up."""
        self.spent_s += seconds
        if isinstance(error, ServerBusy | ServerUnreachable):
            return 0.0  # placement does the waiting: the server is held or ejected
        self.tries += 1
        if isinstance(error, RequestRefused) or self.tries >= self.fleet.max_attempts:
            return None
        pause_s = full_jitter(self.fleet.backoff_base_s, self.fleet.backoff_max_s, self.tries - 1, self.rng)
        self.spent_s += pause_s
        return pause_s if self.spent_s < self.fleet.total_timeout_s else None


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


class Outage:
    """Gives up on a fleet that has had no usable server, or only full queues, for too long.

    Args:
        section: Has `give_up_s` and `request_timeout_s`.
        on_gone: Called when the fleet is given up.
    """

    def __init__(self, section: FleetSection, on_gone: Callable[[], None]) -> None:
        self._section = section
        self._on_gone = on_gone
        self._timer: asyncio.TimerHandle | None = None
        self._gone_since: float | None = None
        self._busy_since: float | None = None

    def answered(self) -> None:
        """Record that a request was answered."""
        self._busy_since = self._gone_since = None

    def began(self, loop: asyncio.AbstractEventLoop) -> None:
        """Record that some model has no usable server.

        The time counts from the first such moment since the last answer.
        """
        if self._timer is not None:
            return
        if self._gone_since is None:
            self._gone_since = loop.time()
        self._timer = loop.call_at(self._gone_since + self._section.give_up_s, self._on_gone)

    def ended(self) -> None:
        """Record that each model has a usable server again; only an answer resets the time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def busy(self, now: float) -> None:
        """Record a full queue at `now`, in seconds of the event loop.

        An accepted request is answered or times out within `request_timeout_s`. When all servers are busy
        for longer than that, none has accepted anything.
        """
        if self._busy_since is None:
            self._busy_since = now
        elif now - self._busy_since > max(self._section.give_up_s, self._section.request_timeout_s):
            self._on_gone()
