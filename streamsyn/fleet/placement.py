"""Placement: which server a request goes to and when: by fair shares of the runs, first come first within.

A request without a group goes to the server with the lowest load. A request of a group waits for its group's
server, which bounded-load rendezvous hashing chooses (`Affinity`). A request whose prefix a leader is just
bringing into a server's cache waits for the leader's first token.

Where a server has data-parallel ranks, each has a cache: a group has a rank there, chosen in the same way,
and leaders lead at a rank. Caps and queues are the server's.
"""

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count

import structlog

from streamsyn.errors import StoppedEarly
from streamsyn.fleet.affinity import PATIENCE_S, Affinity
from streamsyn.fleet.kv_pool import Footprint
from streamsyn.fleet.server import Place, Rank, Server, Waiter, WaitQueue
from streamsyn.fleet.shares import Share, next_share

log = structlog.get_logger()

_DRAINED = "the run is draining, and no server has a free place"
_IDLE = 0.8
"""A server that uses less than this part of its cap takes over requests that wait for other servers."""
_NO_GROUP = Footprint()


class Placement:
    """Hands out places: one per request in flight.

    Every change of state is a synchronous call that ends by giving free places to waiters, so cancellation
    cannot interrupt it.

    Args:
        servers: The servers; more may be added later.
        balance_factor: See `Affinity`.
        leader_wait_s: Longest wait for a leader's first token.
        clock: Seconds of the event loop.
        on_release: Called with the server of each place that is given back.
        on_unused: Called when a place is free and nobody waits for it.
    """

    def __init__(
        self,
        servers: list[Server],
        balance_factor: float,
        leader_wait_s: float,
        clock: Callable[[], float],
        on_release: Callable[[Server], None] = lambda _: None,
        on_unused: Callable[[], None] | None = None,
    ) -> None:
        self.servers = servers
        self._balance_factor = balance_factor
        self._leader_wait_s = leader_wait_s
        self._clock = clock
        self._on_release = on_release
        self._on_unused = on_unused
        self._alone = Share()
        """The share of requests that name none."""
        self._queues: dict[str, WaitQueue] = {}
        """Requests that any server of their model may take, by model."""
        self._affinities: dict[str, Affinity[Server]] = {}
        self._ranks: dict[Server, Affinity[Rank]] = {}
        """The ranks of groups, at servers with several."""
        self._numbers = count()
        self._timer: asyncio.TimerHandle | None = None
        self._wait_ends: dict[tuple[Rank, str], asyncio.TimerHandle] = {}

    @property
    def moves(self) -> int:
        """How often a prefix group changed its server."""
        return sum(affinity.moves for affinity in self._affinities.values())

    async def acquire(
        self,
        footprint: Footprint = _NO_GROUP,
        avoid: Server | None = None,
        model: str = "",
        share: Share | None = None,
    ) -> Place:
        """Wait for a place, if possible at a server other than `avoid`. Call `release` afterwards.

        Args:
            footprint: What is known of the request.
            avoid: A server to use only if there is no other.
            model: The model that the server must have.
            share: The share of the run.

        Raises:
            StoppedEarly: `drain` was called, and no place is free.
        """
        turn: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        share = share or self._alone
        waiter = Waiter(next(self._numbers), footprint, model, share, turn, avoid, self._clock())
        self._put(waiter)
        if turn.done():
            return turn.result()
        if share.is_draining:
            turn.cancel()  # queues skip it
            raise StoppedEarly(_DRAINED)
        self._schedule_dispatch()
        share.waiting += 1
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.done() and turn.exception() is None:
                self.release(turn.result())
            raise
        finally:
            share.waiting -= 1

    def release(self, place: Place) -> None:
        """Give a place back."""
        server = place.server
        place.rank.in_flight -= 1
        server.limiter.end(place.expected)
        place.share.end(server.url)
        if place.leads:  # no first token came
            self._release_followers(place.rank, place.leads, warm=False)
        self._fill(server)
        self._on_release(server)

    def warmed(self, place: Place) -> None:
        """Record the first token: the request's prefixes are in the server's cache."""
        leads, place.leads = place.leads, ()
        self._release_followers(place.rank, leads, warm=True)

    def dispatch(self) -> None:
        """Give free places to waiters; call it when a server has become usable."""
        for server in self.servers:
            self._fill(server)
        self._schedule_dispatch()

    def withdraw(self, server: Server, ranks: int | None = None) -> None:
        """Forget the caches of `server`: its waiters are placed anew, and its groups choose servers anew.

        Args:
            server: Usable no more, unless it has `ranks` to begin with.
            ranks: How many ranks it has from now on; None for as many as before.
        """
        for affinity in self._affinities.values():
            affinity.forget(server)
        self._ranks.pop(server, None)
        for key in [key for key in self._wait_ends if key[0].server is server]:
            self._wait_ends.pop(key).cancel()
        waiters = server.queue.take_all()
        for rank in server.ranks:
            waiters += rank.warm_up.clear()
            rank.prefixes.clear()
            rank.groups = 0
        if ranks is not None:
            server.split(ranks)
        for waiter in sorted(waiters, key=lambda waiter: waiter.number):
            if not waiter.turn.done():
                self._put(waiter)

    def use_ranks(self, server: Server) -> None:
        """Tell those ranks of `server` apart that it takes requests for."""
        ranks = server.client.ranks
        if ranks != len(server.ranks):
            log.info("fleet.ranks", server=server.url, ranks=ranks)
            self.withdraw(server, ranks)

    def held(self, server: Server) -> None:
        """Place the requests that wait for `server` elsewhere if it is held for more than `PATIENCE_S`."""
        if not self._is_held(server):
            return
        for waiter in server.queue.take_all():
            if not waiter.turn.done():
                self._put(waiter)

    def _is_held(self, server: Server) -> bool:
        return server.limiter.held_until > self._clock() + PATIENCE_S

    def drain(self, share: Share | None = None) -> None:
        """End all waits of a share with StoppedEarly; requests in flight are not affected."""
        share = share or self._alone
        share.is_draining = True
        for waiter in self.waiting():
            if waiter.share is share:
                waiter.turn.set_exception(StoppedEarly(_DRAINED))  # queues skip it

    def close(self) -> None:
        """Cancel the timers."""
        for timer in (self._timer, *self._wait_ends.values()):
            if timer is not None:
                timer.cancel()
        self._wait_ends.clear()

    def waiting(self) -> list[Waiter]:
        """Return all requests that wait for a place."""
        waiters = [waiter for queue in self._queues.values() for waiter in queue]
        for server in self.servers:
            waiters += server.queue
            for rank in server.ranks:
                waiters += rank.warm_up.waiting()
        return [waiter for waiter in waiters if not waiter.turn.done()]

    def _put(self, waiter: Waiter) -> None:
        """Give it a free place, or put it into the queue where it belongs."""
        model = waiter.model
        usable = [server for server in self.servers if server.is_usable and model in server.models]
        if waiter.footprint.group and usable:
            fit = [server for server in usable if not self._is_held(server)] or usable
            server = self._affinity(model).server_for(waiter.footprint.group, fit, waiter.avoid)
            if server.queue.heads() or not self._seat(waiter, server):
                server.queue.append(waiter)
            return
        queue = self._queues.setdefault(model, WaitQueue())
        if not queue.heads():
            now = self._clock()
            roomy = [server for server in usable if server.limiter.has_room(now)]
            others = [server for server in roomy if server is not waiter.avoid] or roomy
            if others and self._seat(waiter, min(others, key=_load)):
                return
        queue.append(waiter)

    def _affinity(self, model: str) -> Affinity[Server]:
        affinity = self._affinities.get(model)
        if affinity is None:
            affinity = self._affinities[model] = Affinity(self._balance_factor, self._clock)
        return affinity

    def _rank_for(self, group: str, server: Server) -> Rank:
        """Return the rank of a group at `server`, or that with the least to do for a request without one."""
        if len(server.ranks) == 1:
            return server.ranks[0]
        if not group:
            return min(server.ranks, key=lambda rank: rank.assigned)
        if server not in self._ranks:
            self._ranks[server] = Affinity(self._balance_factor, self._clock)
        return self._ranks[server].server_for(group, server.ranks)

    def _seat(self, waiter: Waiter, server: Server) -> bool:
        """Give it a place at `server`, or have it follow a leader there. False if it has no room."""
        if not server.limiter.has_room(self._clock()):
            return False
        rank = self._rank_for(waiter.footprint.group, server)
        shared = waiter.footprint.prefixes
        if shared and (key := rank.warm_up.find_leader(shared)) is not None:
            rank.warm_up.follow(key, waiter)
            return True
        leads = rank.warm_up.lead(shared) if shared else ()
        for key in leads:
            self._limit_wait(rank, key)
        expected = server.limiter.begin(waiter.footprint, self._clock())
        rank.in_flight += 1
        waiter.share.begin(server.url)
        waiter.turn.set_result(Place(rank, waiter.share, waiter.model, leads, expected))
        return True

    def _fill(self, server: Server) -> None:
        """Give the server's free places to its own waiters and to those of the common queue."""
        while server.is_usable and server.limiter.has_room(self._clock()):
            waiter = self._next_for(server)
            if waiter is None:
                if self._on_unused is not None:
                    self._on_unused()
                return
            self._seat(waiter, server)
        if server.limiter.next_room_at(self._clock()) is not None:
            self._schedule_dispatch()

    def _next_for(self, server: Server) -> Waiter | None:
        """Take the request that gets the next place at `server` out of its queue."""
        heads = server.queue.heads()
        for model in server.models:
            if (queue := self._queues.get(model)) is not None and queue.size:
                heads += queue.heads()
        if not heads:
            if server.assigned >= _IDLE * server.limiter.cap_at(self._clock()):
                return None
            return self._take_over(server)
        waiter = heads[0] if len(heads) == 1 else _fairest(heads)
        assert waiter.queue is not None, "it was found in a queue"
        waiter.queue.remove(waiter)
        return waiter

    def _take_over(self, server: Server) -> Waiter | None:
        """Move a group whose requests have waited long in the longest queue; return one of its requests.

        The request with the shortest conversation is chosen: moving it costs least.
        """
        fullest = max(self.servers, key=lambda other: other.queue.size / other.weight)
        since = self._clock() - PATIENCE_S
        waiting = [
            waiter
            for waiter in fullest.queue
            if waiter.since <= since and waiter.model in server.models and not waiter.turn.done()
        ]
        if not waiting or fullest is server:
            return None
        first = min(waiting, key=lambda waiter: (waiter.footprint.messages, waiter.number))
        group = first.footprint.group
        moving = [
            waiter
            for waiter in fullest.queue
            if waiter.footprint.group == group and waiter.model == first.model
        ]
        for waiter in moving:
            fullest.queue.remove(waiter)
            if waiter is not first:
                server.queue.append(waiter)
        self._affinity(first.model).assign(group, server)
        return first

    def _release_followers(self, rank: Rank, keys: Iterable[str], *, warm: bool) -> None:
        server, keys = rank.server, tuple(keys)
        for key in keys:
            if timer := self._wait_ends.pop((rank, key), None):
                timer.cancel()
        released = rank.warm_up.release(keys, warm=warm)
        unplaced = [
            waiter
            for waiter in released
            if not waiter.turn.done() and not (server.is_usable and self._seat(waiter, server))
        ]
        for waiter in reversed(unplaced):
            is_kept = waiter.footprint.group and server.is_usable
            queue = server.queue if is_kept else self._queues.setdefault(waiter.model, WaitQueue())
            queue.appendleft(waiter)

    def _limit_wait(self, rank: Rank, key: str) -> None:
        """Release the followers of `key` after `leader_wait_s`."""
        end = partial(self._release_followers, rank, (key,), warm=True)
        loop = asyncio.get_running_loop()
        self._wait_ends[rank, key] = loop.call_later(self._leader_wait_s, end)

    def _schedule_dispatch(self) -> None:
        """Set a timer for when a held or slowly starting server has room, or a waiter may move."""
        now = self._clock()
        heads = [waiter for server in self.servers for waiter in server.queue.heads()]
        if not heads and not any(queue.size for queue in self._queues.values()):
            return
        ends = [server.limiter.next_room_at(now) for server in self.servers if server.is_usable]
        ends += [head.since + PATIENCE_S for head in heads if head.since + PATIENCE_S > now]
        end = min((end for end in ends if end is not None), default=None)
        if end is None or (self._timer is not None and self._timer.when() <= end):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(end, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        self.dispatch()


def _load(server: Server) -> tuple[float, int]:
    return server.assigned / server.weight, server.completions


def _fairest(heads: list[Waiter]) -> Waiter:
    """Return the first waiter of the share whose turn it is."""
    first: dict[Share, Waiter] = {}
    for waiter in heads:
        found = first.get(waiter.share)
        if found is None or waiter.number < found.number:
            first[waiter.share] = waiter
    return first[next_share(list(first))]
