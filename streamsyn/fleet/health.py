"""When to try again, and when to give up: plain decisions.

Whether a server is used: in, or ejected until it answers a probe. A plain state machine.

When a fleet that answers nothing is given up: no server in, or all of their queues full, for too long.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from streamsyn.config.sections import FleetSection
from streamsyn.errors import RequestRefused, ServerBusy, ServerError, ServerUnreachable


def full_jitter(base_s: float, longest_s: float, step: int, rng: Random) -> float:
    """A pause drawn evenly from zero to an exponentially growing bound.

    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    return rng.uniform(0, min(longest_s, base_s * 2 ** min(step, 30)))


@dataclass(slots=True)
class RetryBudget:
    """What one request may use up: tries and seconds.

    A full queue costs no try, nor does a server that is not there: it was never asked. So a request
    outlives a fleet that is gone for a while, and many servers that go one after the other.
    """

    fleet: FleetSection
    rng: Random
    tries: int = 0
    spent_s: float = field(default=0.0)

    def pause_after(self, error: ServerError, seconds: float) -> float | None:
        """Seconds to wait before the next try, after one that took `seconds`; None to give up."""
        self.spent_s += seconds
        if isinstance(error, ServerBusy | ServerUnreachable):
            return 0.0  # the waiting is done for a place: the server is held, or ejected
        self.tries += 1
        if isinstance(error, RequestRefused) or self.tries >= self.fleet.max_attempts:
            return None
        pause_s = full_jitter(self.fleet.backoff_base_s, self.fleet.backoff_max_s, self.tries - 1, self.rng)
        self.spent_s += pause_s
        return pause_s if self.spent_s < self.fleet.total_timeout_s else None


@dataclass(slots=True)
class Health:
    """Counts failures in a row; so many of them, or a connection not made, eject the server."""

    eject_after: int
    ejected: bool = False
    failures: int = 0
    ejections: int = 0
    """Since the last answer: a server may answer probes and nothing else."""

    def answered(self) -> None:
        """An answer came, of whatever kind: the server is alive."""
        self.failures = self.ejections = 0

    def failed(self, *, is_there: bool = True) -> bool:
        """No answer came, or the server `is_there` no longer. True when this ejects it."""
        self.failures += 1
        if self.ejected or (is_there and self.failures < self.eject_after):
            return False
        self.ejected = True
        self.ejections += 1
        return True

    def readmit(self) -> None:
        """A probe was answered."""
        self.ejected = False
        self.failures = 0


class Outage:
    """Counts the time since the last answer while no server is in, or while all only say they are busy.

    Args:
        section: Says how long that may last.
        on_gone: Called when it has lasted so long.
    """

    def __init__(self, section: FleetSection, on_gone: Callable[[], None]) -> None:
        self._section = section
        self._on_gone = on_gone
        self._timer: asyncio.TimerHandle | None = None
        self._gone_since: float | None = None
        self._busy_since: float | None = None

    def answered(self) -> None:
        """A request was answered."""
        self._busy_since = self._gone_since = None

    def none_in(self, loop: asyncio.AbstractEventLoop) -> None:
        """No server is in, for a model at the least: the time counts from when it first was so since the
        last answer.
        """
        if self._timer is not None:
            return
        if self._gone_since is None:
            self._gone_since = loop.time()
        self._timer = loop.call_at(self._gone_since + self._section.give_up_s, self._on_gone)

    def some_in(self) -> None:
        """There are servers in again; whether it answers more than probes is to be seen."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def busy(self, now: float) -> None:
        """A queue was full. Full queues are waited for, but not for ever.

        What a server has accepted is answered, or late, within `request_timeout_s`: when all are only
        busy for longer than that, nothing was accepted.
        """
        if self._busy_since is None:
            self._busy_since = now
        elif now - self._busy_since > max(self._section.give_up_s, self._section.request_timeout_s):
            self._on_gone()
