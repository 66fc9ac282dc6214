"""How many servers there should be: a plain rule, without I/O and clock."""

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Scaling:
    """The number of servers, between two bounds, by the work that waits.

    More are wanted at once, for a server takes minutes to load. One is given up only when it was too many for
    `idle_s`, and one at a time: what it has cached is lost.

    Args:
        least: Lower bound.
        most: Upper bound.
        idle_s: Seconds for which there have to be too many.
    """

    least: int
    most: int
    idle_s: float
    _too_many_since: float | None = None

    def wanted(self, running: int, work: float, room: float, now: float) -> int:
        """Return how many servers there should be.

        Args:
            running: Servers that there are, those that start included.
            work: Requests in flight, and those that are known to come; infinite if nobody knows.
            room: Requests that one server can have in flight.
            now: Seconds of one monotonic clock.
        """
        needed = self.most if math.isinf(work) else math.ceil(work / max(1.0, room))
        needed = min(self.most, max(self.least, needed))
        if needed >= running:
            self._too_many_since = None
            return needed
        if self._too_many_since is None:
            self._too_many_since = now
        if now - self._too_many_since < self.idle_s:
            return running
        self._too_many_since = now
        return running - 1
