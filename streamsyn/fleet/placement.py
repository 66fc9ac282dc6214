"""Placement: which server a request goes to and when, first come, first served.

A request without a group goes to the server with the lowest load. A request of a group waits for its group's
server. A request whose prefix a leader is just bringing into a server's cache waits for the leader's first
token.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count

from streamsyn.errors import StoppedEarly
from streamsyn.fleet.affinity import PATIENCE_S, Affinity
from streamsyn.fleet.server import Place, Server, Waiter
from streamsyn.records import Request

_DRAINED = "the run is draining, and no server has a free place"
_IDLE = 0.8
"""A server that uses less than this part of its cap takes over requests that wait for other servers."""
_NO_GROUP = Request([], {})


class Placement:
    """Hands out places: one per request in flight.

    Every change of state is a synchronous call that ends by giving free places to waiters, so cancellation
    cannot interrupt it.

    Args:
        servers: The servers of one model; more may be added later.
        affinity: Maps groups to servers.
        leader_wait_s: Longest wait for a leader's first token.
        clock: Seconds of the event loop.
        on_release: Called with the server of each place that is given back.
    """

    def __init__(
        self,
        servers: list[Server],
        affinity: Affinity,
        leader_wait_s: float,
        clock: Callable[[], float],
        on_release: Callable[[Server], None] = lambda _: None,
    ) -> None:
        self.servers = servers
        self.affinity = affinity
        self._leader_wait_s = leader_wait_s
        self._clock = clock
        self._on_release = on_release
        self._queue: deque[Waiter] = deque()
        self._numbers = count()
        self._timer: asyncio.TimerHandle | None = None
        self._wait_ends: dict[tuple[Server, str], asyncio.TimerHandle] = {}
        self._is_draining = False

    async def acquire(self, request: Request = _NO_GROUP, avoid: Server | None = None) -> Place:
        """Wait for a place, if possible at a server other than `avoid`. Call `release` afterwards.

        Raises:
            StoppedEarly: `drain` was called, and no place is free.
        """
        turn: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        waiter = Waiter(next(self._numbers), request, turn, avoid, self._clock())
        self._put(waiter)
        if not waiter.turn.done():
            if self._is_draining:
                waiter.turn.cancel()  # queues skip it
                raise StoppedEarly(_DRAINED)
            self._schedule_dispatch()
        try:
            return await waiter.turn
        except asyncio.CancelledError:
            if not waiter.turn.cancelled() and waiter.turn.done() and waiter.turn.exception() is None:
                self.release(waiter.turn.result())
            raise

    def release(self, place: Place) -> None:
        """Give a place back."""
        server = place.server
        server.limiter.end(place.expected)
        if place.leads:  # no first token came
            self._release_followers(server, place.leads, warm=False)
        self._fill(server)
        self._on_release(server)

    def warmed(self, place: Place) -> None:
        """Record the first token: the request's prefixes are in the server's cache."""
        leads, place.leads = place.leads, ()
        self._release_followers(place.server, leads, warm=True)

    def dispatch(self) -> None:
        """Give free places to waiters; call it when a server has become usable."""
        for server in self.servers:
            self._fill(server)
        self._schedule_dispatch()

    def withdraw(self, server: Server) -> None:
        """Stop using `server`: its waiters are placed elsewhere, and its groups choose other servers."""
        self.affinity.forget(server)
        server.prefixes.clear()
        for key in [key for key in self._wait_ends if key[0] is server]:
            self._wait_ends.pop(key).cancel()
        waiters = [*server.queue, *server.warm_up.clear()]
        server.queue.clear()
        for waiter in sorted(waiters, key=lambda waiter: waiter.number):
            if not waiter.turn.done():
                self._put(waiter)

    def held(self, server: Server) -> None:
        """Place the requests that wait for `server` elsewhere if it is held for more than `PATIENCE_S`."""
        if not self._is_held(server):
            return
        waiters = list(server.queue)
        server.queue.clear()
        for waiter in waiters:
            if not waiter.turn.done():
                self._put(waiter)

    def _is_held(self, server: Server) -> bool:
        return server.limiter.held_until > self._clock() + PATIENCE_S

    def drain(self) -> None:
        """End all waits with StoppedEarly; requests in flight are not affected."""
        self._is_draining = True
        for waiter in self.waiting():
            waiter.turn.set_exception(StoppedEarly(_DRAINED))
        self._queue.clear()
        for server in self.servers:
            server.queue.clear()

    def close(self) -> None:
        """Cancel the timers."""
        for timer in (self._timer, *self._wait_ends.values()):
            if timer is not None:
                timer.cancel()
        self._wait_ends.clear()

    def waiting(self) -> list[Waiter]:
        """Return all requests that wait for a place."""
        waiters = list(self._queue)
        for server in self.servers:
            waiters += [*server.queue, *server.warm_up.waiting()]
        return [waiter for waiter in waiters if not waiter.turn.done()]

    def _put(self, waiter: Waiter) -> None:
        """Give it a free place, or put it into the queue where it belongs."""
        usable = [server for server in self.servers if server.is_usable]
        if waiter.request.group and usable:
            fit = [server for server in usable if not self._is_held(server)] or usable
            server = self.affinity.server_for(waiter.request.group, fit, waiter.avoid)
            _drop_done(server.queue)
            if server.queue or not self._seat(waiter, server):
                server.queue.append(waiter)
            return
        _drop_done(self._queue)
        if not self._queue:
            now = self._clock()
            roomy = [server for server in usable if server.limiter.has_room(now)]
            others = [server for server in roomy if server is not waiter.avoid] or roomy
            if others and self._seat(waiter, min(others, key=_load)):
                return
        self._queue.append(waiter)

    def _seat(self, waiter: Waiter, server: Server) -> bool:
        """Give it a place at `server`, or have it follow a leader there. False if it has no room."""
        if not server.limiter.has_room(self._clock()):
            return False
        shared = waiter.request.prefixes
        if shared and (key := server.warm_up.find_leader(shared)) is not None:
            server.warm_up.follow(key, waiter)
            return True
        leads = server.warm_up.lead(shared) if shared else ()
        for key in leads:
            self._limit_wait(server, key)
        expected = server.limiter.begin(waiter.request, self._clock())
        waiter.turn.set_result(Place(server, leads, expected))
        return True

    def _fill(self, server: Server) -> None:
        """Give the server's free places to its own waiters and to those of the common queue."""
        while server.is_usable and server.limiter.has_room(self._clock()):
            waiter = self._next_for(server)
            if waiter is None:
                return
            self._seat(waiter, server)
        if server.limiter.next_room_at(self._clock()) is not None:
            self._schedule_dispatch()

    def _next_for(self, server: Server) -> Waiter | None:
        own, common = server.queue, self._queue
        _drop_done(own)
        _drop_done(common)
        if own and (not common or own[0].number < common[0].number):
            return own.popleft()
        if common:
            return common.popleft()
        if server.assigned >= _IDLE * server.limiter.cap_at(self._clock()):
            return None
        return self._take_over(server)

    def _take_over(self, server: Server) -> Waiter | None:
        """Move a group whose requests have waited long in the longest queue; return one of its requests.

        The request with the shortest conversation is chosen: moving it costs least.
        """
        fullest = max(self.servers, key=lambda other: len(other.queue) / other.weight)
        since = self._clock() - PATIENCE_S
        waiting = [waiter for waiter in fullest.queue if waiter.since <= since and not waiter.turn.done()]
        if not waiting or fullest is server:
            return None
        first = min(waiting, key=lambda waiter: (len(waiter.request.messages), waiter.number))
        group = first.request.group
        moving = [waiter for waiter in fullest.queue if waiter.request.group == group]
        for waiter in moving:
            fullest.queue.remove(waiter)
        self.affinity.assign(group, server)
        moving.remove(first)
        server.queue.extend(moving)
        return first

    def _release_followers(self, server: Server, keys: Iterable[str], *, warm: bool) -> None:
        keys = tuple(keys)
        for key in keys:
            if timer := self._wait_ends.pop((server, key), None):
                timer.cancel()
        released = server.warm_up.release(keys, warm=warm)
        unplaced = [
            waiter
            for waiter in released
            if not waiter.turn.done() and not (server.is_usable and self._seat(waiter, server))
        ]
        for waiter in reversed(unplaced):
            queue = server.queue if waiter.request.group and server.is_usable else self._queue
            queue.appendleft(waiter)

    def _limit_wait(self, server: Server, key: str) -> None:
        """Release the followers of `key` after `leader_wait_s`."""
        end = partial(self._release_followers, server, (key,), warm=True)
        loop = asyncio.get_running_loop()
        self._wait_ends[server, key] = loop.call_later(self._leader_wait_s, end)

    def _schedule_dispatch(self) -> None:
        """Set a timer for when a held or slowly starting server has room, or a waiter may move."""
        now = self._clock()
        heads = [server.queue[0] for server in self.servers if server.queue]
        if not heads and not self._queue:
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


def _drop_done(queue: deque[Waiter]) -> None:
    while queue and queue[0].turn.done():
        queue.popleft()
