"""Hedged requests: at the end of a run stragglers are sent to a second server, and the first answer counts.

Source: "hedged requests" of Dean and Barroso, "The Tail at Scale", 2013.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any

import structlog

from streamsyn.background import Background
from streamsyn.errors import ServerError, StoppedEarly
from streamsyn.fleet.kv_pool import Footprint
from streamsyn.fleet.placement import Placement
from streamsyn.fleet.server import Place
from streamsyn.records import Completion

log = structlog.get_logger()

_DEFAULT_SHARE = 0.05
"""Meaning of `fleet.hedge_tail = true`."""
_LATE = 1.2
"""A call is late when it takes this many times the average."""


@dataclass(slots=True, eq=False)
class Call:
    """One try in flight.

    Attributes:
        footprint: What is known of the request.
        place: Where it was sent first.
        send: Makes one try at a place.
        started: When it was sent, in seconds of the event loop.
        failure: The failure at its own server, and the seconds until then, if the second one answered.
        task: Awaits the first try; None when that has ended.
        second: The task of the second try.
        is_sent: Whether the second try was sent.
        answer: The second server's answer.
        context: Context variables of who asks, for the second try.
    """

    footprint: Footprint
    place: Place
    send: Callable[[Place], Awaitable[Completion]]
    started: float
    failure: tuple[ServerError, float] | None = None
    task: "asyncio.Task[Any] | None" = None
    second: "asyncio.Task[None] | None" = None
    is_sent: bool = False
    answer: Completion | None = None
    context: Context = field(default_factory=copy_context)


class Hedging:
    """Sends late requests a second time, once few workers are still busy.

    Args:
        share: `fleet.hedge_tail`: hedge when at most this share of the workers is busy; 0 or False for never.
        placement: Hands out places at second servers.
        tasks: Run the second tries.
    """

    def __init__(self, share: bool | float, placement: Placement, tasks: Background) -> None:
        self._placement = placement
        self._share = _DEFAULT_SHARE if share is True else float(share)
        self._tasks = tasks
        self._calls: dict[Call, None] = {}
        self._answers = 0
        self._total_s = 0.0

    @property
    def is_on(self) -> bool:
        """Whether tries must go through `ask`."""
        return self._share > 0

    async def ask(self, call: Call) -> Completion:
        """Return the answer to `call`, from its own server or from a second one.

        Raises:
            ServerError: Neither answered; the error is that of its own server.
        """
        self._calls[call] = None
        task = call.task = asyncio.current_task()
        assert task is not None, "called from an asyncio task"
        try:
            completion = await call.send(call.place)
        except asyncio.CancelledError:
            # When the second answer comes, it cancels the first try, which aborts the request at its server.
            if call.answer is None or task.uncancel() > 0:
                raise
            return call.answer
        except ServerError as error:
            call.task = None
            if call.second is None or not call.is_sent:
                raise
            seconds = asyncio.get_running_loop().time() - call.started
            await asyncio.wait([call.second])
            if call.answer is None:
                raise
            call.failure = error, round(seconds, 4)
            return call.answer
        finally:
            call.task = None
            del self._calls[call]
            if call.second is not None:
                call.second.cancel()
        self._answers += 1
        self._total_s += asyncio.get_running_loop().time() - call.started
        return completion

    def tail(self, busy: int, workers: int) -> None:
        """Record that there is no new work, and that `busy` of `workers` workers are still busy."""
        if not self.is_on or busy > max(1.0, self._share * workers) or not self._answers:
            return
        for call in self._calls:
            if call.second is None:
                call.second = self._tasks.start(self._hedge(call), name="hedge", context=call.context)

    async def _hedge(self, call: Call) -> None:
        clock = asyncio.get_running_loop().time
        late_at = call.started + _LATE * self._total_s / self._answers
        await asyncio.sleep(max(0.0, late_at - clock()))
        first = call.place
        if not any(
            server.is_usable
            and first.model in server.models
            and (server is not first.server or len(server.ranks) > 1)
            for server in self._placement.servers
        ):
            return
        # Without its group, which stays at its server for its later requests.
        footprint = call.footprint.without_group()
        try:
            place = await self._placement.acquire(footprint, first.server, first.model, first.share)
        except StoppedEarly:
            return
        try:
            if place.rank is first.rank:
                return  # there is no other rank
            log.debug("fleet.hedged", server=first.server.url, second=place.server.url)
            call.is_sent = True
            call.answer = await call.send(place)
        except ServerError as error:
            log.debug("fleet.hedge_failed", server=place.server.url, error=str(error))
        else:
            if call.task is not None:
                call.task.cancel()
        finally:
            self._placement.release(place)
