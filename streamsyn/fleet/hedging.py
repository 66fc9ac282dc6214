"""At the end of a run: stragglers are asked a second time elsewhere, and the first answer counts.

Idea: "hedged requests" of Dean and Barroso, "The Tail at Scale", 2013.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from streamsyn.background import Background
from streamsyn.errors import ServerError, StoppedEarly
from streamsyn.fleet.placement import Placement
from streamsyn.fleet.server import Place
from streamsyn.records import Completion, Request

log = structlog.get_logger()

_TRUE = 0.05
"""What `fleet.hedge_tail = true` stands for."""
_LATE = 1.2
"""A call is late when it takes so many times as long as others did on average."""


@dataclass(slots=True, eq=False)
class Call:
    """One try that is under way."""

    request: Request
    place: Place
    pool: Placement
    started: float
    scope: asyncio.Timeout | None = None
    second: "asyncio.Task[None] | None" = None
    answer: Completion | None = None
    """From the second server, if that was quicker."""


class Hedging:
    """Asks again what takes long, once the run has nothing else to do.

    Args:
        share: `fleet.hedge_tail`: how few workers, of all, must be left at work; 0 or False for never.
        tasks: Where second tries run.
        ask: One try at one server.
    """

    def __init__(
        self,
        share: bool | float,
        tasks: Background,
        ask: Callable[[Place, Placement, Request], Awaitable[Completion]],
    ) -> None:
        self._share = _TRUE if share is True else float(share)
        self._tasks = tasks
        self._ask = ask
        self._calls: dict[Call, None] = {}
        self._answers = 0
        self._seconds = 0.0

    @property
    def is_on(self) -> bool:
        """Whether tries have to go through `ask`."""
        return self._share > 0

    async def ask(self, call: Call) -> Completion:
        """The answer to `call`, of its own server or of a second one.

        Raises:
            ServerError: Neither gave one; that of its own server.
        """
        self._calls[call] = None
        try:
            # The scope has no end until the second answer sets one: then it cancels the first try,
            # which aborts it at its server.
            async with asyncio.timeout(None) as call.scope:
                completion = await self._ask(call.place, call.pool, call.request)
        except TimeoutError:
            if call.answer is None:
                raise
            return call.answer
        finally:
            del self._calls[call]
            if call.second is not None:
                call.second.cancel()
        self._answers += 1
        self._seconds += asyncio.get_running_loop().time() - call.started
        return completion

    def tail(self, left: int, of: int) -> None:
        """There is no more work to begin: `left` workers `of` so many are still at theirs."""
        if not self.is_on or left > max(1.0, self._share * of) or not self._answers:
            return
        for call in self._calls:
            if call.second is None:
                call.second = self._tasks.start(self._again(call), name="hedge")

    async def _again(self, call: Call) -> None:
        clock = asyncio.get_running_loop().time
        late_at = call.started + _LATE * self._seconds / self._answers
        await asyncio.sleep(max(0.0, late_at - clock()))
        try:
            place = await call.pool.acquire(call.request, avoid=call.place.server)
        except StoppedEarly:
            return
        try:
            if place.server is call.place.server:
                return  # there is no other
            log.info("fleet.hedged", server=call.place.server.url, second=place.server.url)
            call.answer = await self._ask(place, call.pool, call.request)
        except ServerError as error:
            log.debug("fleet.hedge_failed", server=place.server.url, error=str(error))
        else:
            if call.scope is not None and not call.scope.expired():
                call.scope.reschedule(clock())
        finally:
            call.pool.release(place)
