"""Session affinity: at which server a prefix group is, and at which of the server's data-parallel ranks.

Plain synchronous classes; the clock is an argument.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Generic, Protocol, TypeVar

PATIENCE_S = 2.0
"""How long a server has to be overloaded before groups leave it. Requests come in bursts: a second over the
share costs less than computing a group's whole prefix again elsewhere."""
_MAX_GROUPS = 65_536
"""Groups remembered."""
_CHANCE = 4.0
"""Tolerance above the share, in units of its square root: within it the excess is chance, not load."""


class Home(Protocol):
    """Where groups can be: a server, or a rank of one.

    Attributes:
        groups: Number of groups there.
    """

    groups: int

    @property
    def url(self) -> str:
        """Its name."""
        ...

    @property
    def weight(self) -> float:
        """Its share of the requests relative to the others."""
        ...

    @property
    def assigned(self) -> int:
        """Requests in flight there, or waiting for it."""
        ...

    @property
    def cap(self) -> float:
        """Maximum requests in flight."""
        ...


H = TypeVar("H", bound=Home)


class Affinity(Generic[H]):
    """Session affinity: gives each group a server, and a different one when that is overloaded or unusable.

    Hashing spreads groups evenly only where there are many. So a new server is chosen more strictly than an
    old one is kept: hashing decides among the servers that are within their share of the load, and no server
    gets more than `balance_factor` times its share of groups.

    Sources: Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998 (rendezvous);
    Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads", arXiv 1608.01350.

    Args:
        balance_factor: A server with more than this times its share of the load is overloaded.
        clock: Seconds of the event loop.
    """

    def __init__(self, balance_factor: float, clock: Callable[[], float]) -> None:
        self._factor = balance_factor
        self._clock = clock
        self._server_of: OrderedDict[str, H] = OrderedDict()
        self._over_since: dict[H, float] = {}
        self.moves = 0
        """How often a group changed its server."""

    def server_for(self, group: str, servers: Sequence[H], avoid: H | None = None) -> H:
        """Return the server for a request of `group`, and remember it.

        Args:
            group: The group's key.
            servers: The usable servers; at least one.
            avoid: Where the request has just failed; used only if there is no other server.
        """
        current = self._server_of.get(group)
        fair = fair_shares(servers, sum(server.assigned for server in servers) + 1)
        share_of = dict(zip(servers, fair, strict=True))
        if (
            current is not None
            and current in share_of
            and current is not avoid
            and not self._is_overloaded(current, share_of[current])
        ):
            self._server_of.move_to_end(group)
            return current
        others = [server for server in servers if server is not avoid] or servers
        fit = [server for server in others if server.assigned < math.ceil(share_of[server])] or others
        weights = sum(server.weight for server in servers)
        ranked = sorted(fit, key=lambda server: _rank(group, server), reverse=True)
        chosen = next(
            (server for server in ranked if self._takes_group(server, server.weight / weights)), None
        )
        chosen = chosen or min(ranked, key=lambda server: (server.groups + 1) / server.weight)
        self.assign(group, chosen)
        return chosen

    def assign(self, group: str, server: H) -> None:
        """Send `group` to `server` from now on."""
        before = self._server_of.get(group)
        if before is not server:
            if before is not None:
                before.groups -= 1
                self.moves += 1
            server.groups += 1
            self._server_of[group] = server
        self._server_of.move_to_end(group)
        while len(self._server_of) > _MAX_GROUPS:
            _, other = self._server_of.popitem(last=False)
            other.groups -= 1

    def forget(self, server: H) -> None:
        """Release the groups of a server that is no longer usable: their next requests choose another."""
        for group in [group for group, current in self._server_of.items() if current is server]:
            del self._server_of[group]
        self._over_since.pop(server, None)
        server.groups = 0

    def _is_overloaded(self, server: H, share: float) -> bool:
        """Whether one more request keeps it above its share, as it has been for `PATIENCE_S`."""
        if server.assigned + 1 <= max(1.0, self._factor * share, share + _CHANCE * math.sqrt(share)):
            self._over_since.pop(server, None)
            return False
        now = self._clock()
        return now - self._over_since.setdefault(server, now) >= PATIENCE_S

    def _takes_group(self, server: H, share: float) -> bool:
        mean = (len(self._server_of) + 1) * share
        return server.groups + 1 <= max(math.ceil(mean), int(self._factor * mean))


def fair_shares(servers: Sequence[Home], total: int) -> list[float]:
    """Return how many of `total` requests each server should have: by weight, but at most its cap.

    Requests beyond all caps wait, and are spread by weight again. Caps alone would be a poor measure: while
    they grow, and where nothing presses them, they differ by accident.
    """
    weights = sum(server.weight for server in servers)
    beyond = total - sum(server.cap for server in servers)
    if beyond >= 0:
        return [server.cap + beyond * server.weight / weights for server in servers]
    # Water filling: servers that are full at the lowest level first, the others share the rest.
    level, rest = 0.0, float(total)
    for server in sorted(servers, key=lambda server: server.cap / server.weight):
        level = rest / weights
        if server.cap >= level * server.weight:
            break
        rest -= server.cap
        weights -= server.weight
    return [min(server.cap, level * server.weight) for server in servers]


def _rank(group: str, server: Home) -> float:
    """Weighted rendezvous score: the highest wins, in proportion to the weights."""
    drawn = blake2b(f"{group}\0{server.url}".encode(), digest_size=8).digest()
    unit = (int.from_bytes(drawn) + 1) / (2**64 + 1)
    return -server.weight / math.log(unit)
