"""Which server a request goes to, and when: places in flight, given out in the order of asking.

A request without a group goes to whichever server has the smallest load; one that belongs to a group
waits for its group's server. While a beginning that it shares with others is just being brought into a
server's cache, it waits for that too.
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

_DRAINED = "the run is draining, and no server has a place"
_IDLE = 0.8
"""A server that uses less than this part of its cap takes over requests that wait for another one."""
_NOTHING = Request([], {})


class Placement:
    """Hands out places in flight.

    Every change of state is a plain call that ends by giving free places to those who wait; nothing can
    be interrupted half-way.

    Args:
        servers: May be added to later.
        homes: Where groups are at home.
        leader_wait_s: The longest wait for a leader.
        clock: Seconds of the event loop.
    """

    def __init__(
        self, servers: list[Server], homes: Affinity, leader_wait_s: float, clock: Callable[[], float]
    ) -> None:
        self.servers = servers
        self.homes = homes
        self._leader_wait_s = leader_wait_s
        self._clock = clock
        self._common: deque[Waiter] = deque()
        self._numbers = count()
        self._timer: asyncio.TimerHandle | None = None
        self._wait_ends: dict[tuple[Server, str], asyncio.TimerHandle] = {}
        self._is_draining = False

    async def acquire(self, request: Request = _NOTHING, avoid: Server | None = None) -> Place:
        """Wait for a place, if possible at another server than `avoid`; `release` it after.

        Raises:
            StoppedEarly: `drain` was called, and there is no place.
        """
        turn: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        waiter = Waiter(next(self._numbers), request, turn, avoid, self._clock())
        self._put(waiter)
        if not waiter.turn.done():
            if self._is_draining:
                waiter.turn.cancel()  # whoever comes upon it in a queue skips it
                raise StoppedEarly(_DRAINED)
            self._look_again_later()
        try:
            return await waiter.turn
        except asyncio.CancelledError:
            if not waiter.turn.cancelled() and waiter.turn.done() and waiter.turn.exception() is None:
                self.release(waiter.turn.result())
            raise

    def release(self, place: Place) -> None:
        """Give a place back."""
        server = place.server
        server.limiter.in_flight -= 1
        if place.leads:  # no first token came
            self._release(server, place.leads, warm=False)
        self._fill(server)

    def warmed(self, place: Place) -> None:
        """The first token has come: what the request begins with is in the server's cache."""
        leads, place.leads = place.leads, ()
        self._release(place.server, leads, warm=True)

    def dispatch(self) -> None:
        """Give what is free to those who wait; to be called when a server has become usable."""
        for server in self.servers:
            self._fill(server)
        self._look_again_later()

    def left(self, server: Server) -> None:
        """`server` is out: who waits for it goes elsewhere, and its groups find other homes."""
        self.homes.forget(server)
        server.prefixes.clear()
        waiters = [*server.queue, *server.leaders.clear()]
        server.queue.clear()
        for waiter in sorted(waiters, key=lambda waiter: waiter.number):
            if not waiter.turn.done():
                self._put(waiter)

    def drain(self) -> None:
        """Let nobody wait any longer: a drain is for what is in flight."""
        self._is_draining = True
        for waiter in self._all_waiters():
            if not waiter.turn.done():
                waiter.turn.set_exception(StoppedEarly(_DRAINED))
        self._common.clear()
        for server in self.servers:
            server.queue.clear()

    def close(self) -> None:
        """Stop the timers."""
        for timer in (self._timer, *self._wait_ends.values()):
            if timer is not None:
                timer.cancel()
        self._wait_ends.clear()

    def _put(self, waiter: Waiter) -> None:
        """Give it a place if there is one, else let it wait where it should."""
        usable = [server for server in self.servers if server.is_in]
        if waiter.request.group and usable:
            server = self.homes.home(waiter.request.group, usable, waiter.avoid)
            _drop_cancelled(server.queue)
            if server.queue or not self._seat(waiter, server):
                server.queue.append(waiter)
            return
        _drop_cancelled(self._common)
        if not self._common:
            now = self._clock()
            roomy = [server for server in usable if server.limiter.has_room(now)]
            others = [server for server in roomy if server is not waiter.avoid] or roomy
            if others and self._seat(waiter, min(others, key=_load)):
                return
        self._common.append(waiter)

    def _seat(self, waiter: Waiter, server: Server) -> bool:
        """Give it a place at `server`, or have it follow a leader there; False when there is no room."""
        if not server.limiter.has_room(self._clock()):
            return False
        beginnings = waiter.request.beginnings
        if beginnings and (key := server.leaders.led(beginnings)) is not None:
            server.leaders.follow(key, waiter)
            return True
        leads = server.leaders.lead(beginnings) if beginnings else ()
        for key in leads:
            self._bound_wait(server, key)
        server.limiter.in_flight += 1
        waiter.turn.set_result(Place(server, leads))
        return True

    def _fill(self, server: Server) -> None:
        """Give the server's free places to those who wait for it, then to those who wait for any."""
        while server.is_in and server.limiter.has_room(self._clock()):
            waiter = self._next_for(server)
            if waiter is None:
                return
            self._seat(waiter, server)
        if server.limiter.next_room_at(self._clock()) is not None:
            self._look_again_later()

    def _next_for(self, server: Server) -> Waiter | None:
        own, common = server.queue, self._common
        _drop_cancelled(own)
        _drop_cancelled(common)
        if own and (not common or own[0].number < common[0].number):
            return own.popleft()
        if common:
            return common.popleft()
        if server.assigned >= _IDLE * server.limiter.cap_at(self._clock()):
            return None
        return self._taken_over(server)

    def _taken_over(self, server: Server) -> Waiter | None:
        """One who has waited long enough in the longest queue, with all of its group that waits there.

        The one with the shortest past: it loses least by moving.
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
        self.homes.move(group, server)
        moving.remove(first)
        server.queue.extend(moving)
        return first

    def _release(self, server: Server, keys: Iterable[str], *, warm: bool) -> None:
        keys = tuple(keys)
        for key in keys:
            if timer := self._wait_ends.pop((server, key), None):
                timer.cancel()
        released = server.leaders.release(keys, warm=warm)
        left = [
            waiter
            for waiter in released
            if not waiter.turn.done() and not (server.is_in and self._seat(waiter, server))
        ]
        for waiter in reversed(left):
            queue = server.queue if waiter.request.group and server.is_in else self._common
            queue.appendleft(waiter)

    def _bound_wait(self, server: Server, key: str) -> None:
        end = partial(self._release, server, (key,), warm=True)
        loop = asyncio.get_running_loop()
        self._wait_ends[server, key] = loop.call_later(self._leader_wait_s, end)

    def _look_again_later(self) -> None:
        """Look when a server that is held, or starts slowly, has room again, or someone has waited long."""
        now = self._clock()
        heads = [server.queue[0] for server in self.servers if server.queue]
        if not heads and not self._common:
            return
        ends = [server.limiter.next_room_at(now) for server in self.servers if server.is_in]
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

    def _all_waiters(self) -> list[Waiter]:
        waiting = list(self._common)
        for server in self.servers:
            waiting += [*server.queue, *server.leaders.waiting()]
        return waiting


def _load(server: Server) -> tuple[float, int]:
    return server.assigned / server.weight, server.completions


def _drop_cancelled(queue: deque[Waiter]) -> None:
    while queue and queue[0].turn.done():
        queue.popleft()
