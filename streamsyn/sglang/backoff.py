"""When to try again, and when to give up: plain decisions."""

from dataclasses import dataclass, field
from random import Random

from streamsyn.errors import RequestRefused, ServerBusy, ServerError, ServerUnreachable
from streamsyn.sections import FleetSection


def full_jitter(base_s: float, longest_s: float, step: int, draw: Random) -> float:
    """A pause drawn evenly from zero to an exponentially growing bound.

    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    return draw.uniform(0, min(longest_s, base_s * 2 ** min(step, 30)))


@dataclass(slots=True)
class RetryBudget:
    """What one request may use up: tries and seconds.

    A full queue costs no try, nor does a server that is not there: it was never asked. So a request
    outlives a fleet that is gone for a while, and many servers that go one after the other.
    """

    fleet: FleetSection
    draw: Random
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
        pause_s = full_jitter(self.fleet.backoff_base_s, self.fleet.backoff_max_s, self.tries - 1, self.draw)
        self.spent_s += pause_s
        return pause_s if self.spent_s < self.fleet.total_timeout_s else None
