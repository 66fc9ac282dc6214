"""When a fleet that answers nothing is given up: no server in, or all of their queues full, for too long."""

import asyncio
from collections.abc import Callable

from streamsyn.sections import FleetSection


class Outage:
    """Counts the time since the last answer while no server is in, or while all only say they are busy.

    Args:
        section: Says how long that may last.
        on_gone: Called when it has lasted so long.
    """

    def __init__(self, section: FleetSection, on_gone: Callable[[], None]) -> None:
        self._section = section
        self._on_gone = on_gone
        self._timer: asyncio.TimerHandle | None = None
        self._gone_since: float | None = None
        self._busy_since: float | None = None

    def answered(self) -> None:
        """A request was answered."""
        self._busy_since = self._gone_since = None

    def none_in(self, loop: asyncio.AbstractEventLoop) -> None:
        """No server is in, for a model at the least: the time counts from when it first was so since the
        last answer.
        """
        if self._timer is not None:
            return
        if self._gone_since is None:
            self._gone_since = loop.time()
        self._timer = loop.call_at(self._gone_since + self._section.give_up_s, self._on_gone)

    def some_in(self) -> None:
        """There are servers in again; whether it answers more than probes is to be seen."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def busy(self, now: float) -> None:
        """A queue was full. Full queues are waited for, but not for ever.

        What a server has accepted is answered, or late, within `request_timeout_s`: when all are only
        busy for longer than that, nothing was accepted.
        """
        if self._busy_since is None:
            self._busy_since = now
        elif now - self._busy_since > max(self._section.give_up_s, self._section.request_timeout_s):
            self._on_gone()
