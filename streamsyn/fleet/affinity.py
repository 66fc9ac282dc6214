"""Which server a prefix group is at home at: bounded-load rendezvous hashing.

Sources: Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998 (rendezvous);
Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads", arXiv 1608.01350.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b

from streamsyn.fleet.models import fair
from streamsyn.fleet.server import Server

PATIENCE_S = 2.0
"""How long a server has to be over its share before groups leave it. A move costs their whole prefix, and
requests come and go in bursts: what is over in a second costs less than to compute the prefix again."""
_KNOWN = 65_536
"""Groups remembered."""
_CHANCE = 4.0
"""A server may be over its share by so many times the square root of it: that is chance, not load."""


class Affinity:
    """Gives each group a server, and another one when that is overloaded or out.

    Hashing spreads groups evenly only where there are very many of them, so a new home is chosen more
    strictly than an old one is kept: hashing decides among the servers that have no more than their share
    of the load, and no server gets more than `balance_factor` times its share of groups.

    Args:
        balance_factor: A server that has more than so many times its share of the load is over it.
        clock: Seconds of the event loop.
    """

    def __init__(self, balance_factor: float, clock: Callable[[], float]) -> None:
        self._factor = balance_factor
        self._clock = clock
        self._homes: OrderedDict[str, Server] = OrderedDict()
        self._over_since: dict[Server, float] = {}
        self.moves = 0
        """How often a group changed its server."""

    def home(self, group: str, servers: Sequence[Server], avoid: Server | None = None) -> Server:
        """The server that a request of `group` goes to, out of `servers`, which are usable.

        Args:
            group: The group's key.
            servers: At least one.
            avoid: Where the request has just failed: another one, if there is.
        """
        at = self._homes.get(group)
        shares = fair(servers, sum(server.assigned for server in servers) + 1)
        share_of = dict(zip(servers, shares, strict=True))
        if at in share_of and at is not avoid and not self._is_long_over(at, share_of[at]):
            self._homes.move_to_end(group)
            return at
        others = [server for server in servers if server is not avoid] or servers
        fit = [server for server in others if server.assigned < math.ceil(share_of[server])] or others
        weights = sum(server.weight for server in servers)
        ranked = sorted(fit, key=lambda server: _rank(group, server), reverse=True)
        home = next((server for server in ranked if self._takes_group(server, server.weight / weights)), None)
        home = home or min(ranked, key=lambda server: (server.homes + 1) / server.weight)
        self.move(group, home)
        return home

    def move(self, group: str, home: Server) -> None:
        """From now on `group` is at home there."""
        before = self._homes.get(group)
        if before is not home:
            if before is not None:
                before.homes -= 1
                self.moves += 1
            home.homes += 1
            self._homes[group] = home
        self._homes.move_to_end(group)
        while len(self._homes) > _KNOWN:
            _, forgotten = self._homes.popitem(last=False)
            forgotten.homes -= 1

    def forget(self, server: Server) -> None:
        """`server` is out: its groups find other homes when they are asked for."""
        for group in [group for group, home in self._homes.items() if home is server]:
            del self._homes[group]
        self._over_since.pop(server, None)
        server.homes = 0

    def _is_long_over(self, server: Server, share: float) -> bool:
        """Whether it has had more than it should for a while, with one request more."""
        if server.assigned + 1 <= max(1.0, self._factor * share, share + _CHANCE * math.sqrt(share)):
            self._over_since.pop(server, None)
            return False
        now = self._clock()
        return now - self._over_since.setdefault(server, now) >= PATIENCE_S

    def _takes_group(self, server: Server, share: float) -> bool:
        mean = (len(self._homes) + 1) * share
        return server.homes + 1 <= max(math.ceil(mean), int(self._factor * mean))


def _rank(group: str, server: Server) -> float:
    """Weighted rendezvous score: the highest wins, in proportion to the weights."""
    drawn = blake2b(f"{group}\0{server.url}".encode(), digest_size=8).digest()
    unit = (int.from_bytes(drawn) + 1) / (2**64 + 1)
    return -server.weight / math.log(unit)
