"""Fair shares: which of the runs that share a fleet gets the next place, and how many each may expect.

Plain synchronous classes without a clock. A share that does not wait costs the others nothing.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final, Literal

Priority = Literal["low", "normal", "high"]

PRIORITIES: Final[dict[Priority, float]] = {"low": 1 / 8, "normal": 1.0, "high": 8.0}
"""Factors of a run's weight. They are finite, so no run starves."""

_MOST_CREDIT: Final = 0.5
"""Bound of the credit of a share that has places, so that what it has stays near its part."""


@dataclass(slots=True, eq=False)
class Share:
    """What one run has of a fleet.

    Attributes:
        weight: Its weight relative to the other shares, priority included.
        in_flight: Its requests in flight at all servers.
        waiting: Its requests that wait for a place.
        in_flight_at: Its requests in flight, by the URL of their server.
        credit: Fractions of a place that it was owed and did not get, since places are whole.
        is_draining: Its requests do not wait for places any more.
        not_begun: Returns how many drafts no worker has taken yet; infinity as long as that is not known.
    """

    weight: float = 1.0
    in_flight: int = 0
    waiting: int = 0
    in_flight_at: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    credit: float = 0.0
    is_draining: bool = False
    not_begun: Callable[[], float] = lambda: inf

    @property
    def wanted(self) -> int:
        """Places that it could use now."""
        return self.in_flight + self.waiting

    def begin(self, url: str) -> None:
        """Count a request as in flight at the server `url`."""
        self.in_flight += 1
        self.in_flight_at[url] += 1

    def end(self, url: str) -> None:
        """Undo `begin`."""
        self.in_flight -= 1
        self.in_flight_at[url] -= 1


def next_share(waiting: Sequence[Share]) -> Share:
    """Return the one of the shares that wait which gets the next place: the one furthest below its part.

    The parts are those, by weight, of the places that these shares have. A part is seldom a whole number, and
    may be less than one; the credit carries the fractions over, as nginx's smooth weighted round-robin does.
    """
    if len(waiting) == 1:
        return waiting[0]
    weights = sum(share.weight for share in waiting)
    places = 1 + sum(share.in_flight for share in waiting)
    chosen = max(waiting, key=lambda share: places * share.weight / weights - share.in_flight + share.credit)
    for share in waiting:
        credit = max(-_MOST_CREDIT, share.credit + share.weight / weights - (share is chosen))
        # Without a place, its credit grows until it gets one.
        share.credit = min(_MOST_CREDIT, credit) if share.in_flight else credit
    return chosen


class Shares:
    """The shares of a fleet that are open: one for each run."""

    def __init__(self) -> None:
        self._open: list[Share] = []

    def open(self, weight: float = 1.0, priority: Priority = "normal") -> Share:
        """Return a new share."""
        share = Share(weight * PRIORITIES[priority])
        self._open.append(share)
        return share

    def close(self, share: Share) -> None:
        """Forget a share."""
        self._open.remove(share)

    def left(self) -> float:
        """Return how many requests are in flight, wait, or will come; infinity if a share does not know."""
        return sum(share.wanted + share.not_begun() for share in self._open)

    def capacity(self, share: Share, places: int) -> int:
        """Return how many of all `places` a share could have if it asked for all, rounded up.

        The others keep what they can use, up to their parts by weight.
        """
        others = [other for other in self._open if other is not share and other.wanted]
        weights = share.weight + sum(other.weight for other in others)
        rest = float(places)
        for other in sorted(others, key=lambda other: other.wanted / other.weight):
            if other.wanted * weights >= rest * other.weight:
                break  # it can use its part, and so can all after it
            rest -= other.wanted
            weights -= other.weight
        return -int(-rest * share.weight // weights)
