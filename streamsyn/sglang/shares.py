"""What part of all requests each server should have: a plain computation."""

from collections.abc import Sequence
from typing import Protocol


class Sharer(Protocol):
    """What takes part: a server."""

    @property
    def weight(self) -> float:
        """Its part, beside the others'."""
        ...

    @property
    def cap(self) -> int:
        """What it can have in flight."""
        ...


def fair(servers: Sequence[Sharer], total: int) -> list[float]:
    """How many of `total` requests each server should have: by weight, but none more than its cap.

    What no server can have in flight waits, and is spread by weight again. Caps alone would be no measure:
    while they grow, and where nothing presses them, they differ by accident.
    """
    weights = sum(server.weight for server in servers)
    beyond = total - sum(server.cap for server in servers)
    if beyond >= 0:
        return [server.cap + beyond * server.weight / weights for server in servers]
    # Water filling: those that are full at the lowest level first, the others share what is left.
    level, left = 0.0, float(total)
    for server in sorted(servers, key=lambda server: server.cap / server.weight):
        level = left / weights
        if server.cap >= level * server.weight:
            break
        left -= server.cap
        weights -= server.weight
    return [min(server.cap, level * server.weight) for server in servers]
