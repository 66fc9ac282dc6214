"""Which server a request goes to: the usable one with the fewest in flight; a queue when there is none."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from streamsyn.errors import StoppedEarly
from streamsyn.sglang.server import Server

_DRAINED = "the run is draining, and no server has a place"


@dataclass(slots=True, eq=False)
class _Waiter:
    turn: asyncio.Future[Server]
    avoid: Server | None


class Placement:
    """Hands out places in flight, first come first served.

    Every change of state is a plain call and ends with `dispatch`, which gives free places to those
    who wait; nothing can be interrupted half-way.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = servers
        self._waiters: deque[_Waiter] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._draining = False

    async def acquire(self, avoid: Server | None = None) -> Server:
        """Wait for a place at a server, if possible another one than `avoid`; `release` it after.

        Raises:
            StoppedEarly: `drain` was called, and there is no place.
        """
        if not self._waiters and (server := self._pick(avoid)) is not None:
            server.limiter.in_flight += 1
            return server
        if self._draining:
            raise StoppedEarly(_DRAINED)
        waiter = _Waiter(asyncio.get_running_loop().create_future(), avoid)
        self._waiters.append(waiter)
        self.dispatch()
        try:
            return await waiter.turn
        except asyncio.CancelledError:
            if waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self.release(waiter.turn.result())
            raise

    def release(self, server: Server) -> None:
        """Give a place back."""
        server.limiter.in_flight -= 1
        self.dispatch()

    def dispatch(self) -> None:
        """Give what is free to those who wait; to be called when a server has become usable."""
        while self._waiters:
            waiter = self._waiters[0]
            if not waiter.turn.done():  # else it was cancelled
                server = self._pick(waiter.avoid)
                if server is None:
                    self._dispatch_after_hold()
                    return
                server.limiter.in_flight += 1
                waiter.turn.set_result(server)
            self._waiters.popleft()

    def drain(self) -> None:
        """Let nobody wait any longer: a drain is for what is in flight."""
        self._draining = True
        for waiter in self._waiters:
            if not waiter.turn.done():
                waiter.turn.set_exception(StoppedEarly(_DRAINED))
        self._waiters.clear()

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _pick(self, avoid: Server | None) -> Server | None:
        now = time.monotonic()
        usable = [server for server in self._servers if server.is_usable(now)]
        others = [server for server in usable if server is not avoid]
        return min(others or usable, key=_load, default=None)

    def _dispatch_after_hold(self) -> None:
        now = time.monotonic()
        ends = [server.limiter.held_until for server in self._servers if server.limiter.held_until > now]
        self.close()
        if ends:
            self._timer = asyncio.get_running_loop().call_later(min(ends) - now, self.dispatch)


def _load(server: Server) -> tuple[int, int]:
    return server.limiter.in_flight, server.completions
