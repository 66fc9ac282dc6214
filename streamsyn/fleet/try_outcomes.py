"""What the outcome of each try changes: counters, and the limiter and health of its server."""

import asyncio
from collections.abc import Callable
from random import Random

import structlog

from streamsyn.errors import (
    BrokenResponse,
    RateLimited,
    RequestRefused,
    ServerBusy,
    ServerError,
    ServerUnreachable,
)
from streamsyn.fleet.health import Outage, RetryBudget
from streamsyn.fleet.membership import Membership
from streamsyn.fleet.server import Server, Timings, Usage
from streamsyn.records import Completion

log = structlog.get_logger()


class TryOutcomes:
    """Records the outcomes of one run's tries.

    Args:
        membership: The servers.
        outage: Learns of answers and refusals.
        rng: For jitter.
        capacity: Returns how many requests the run may have in flight.

    Attributes:
        timings: How long this run's requests took.
        usage: Counters of this run's requests at shared servers, by URL.
        limited: Requests with rate limits of their own.
        on_room: Called when a worker waits without needing a place.
    """

    def __init__(
        self, membership: Membership, outage: Outage, rng: Random, capacity: Callable[[], int]
    ) -> None:
        self._membership = membership
        self._outage = outage
        self._rng = rng
        self._capacity = capacity
        self._clock = asyncio.get_running_loop().time
        self._answers = 0
        self.timings = Timings()
        self.usage: dict[str, Usage] = {}
        self.limited = 0
        self.on_room: Callable[[], None] = lambda: None

    def waited(self, server: Server, seconds: float) -> None:
        """Record how long a request waited for its place."""
        self.timings.queue_wait.observe(seconds)
        server.timings.queue_wait.observe(seconds)

    def began(self, server: Server, seconds: float) -> None:
        """Record the first token of an answer, `seconds` after the request was sent."""
        self.timings.time_to_first_token.observe(seconds)
        server.timings.time_to_first_token.observe(seconds)

    def answered(
        self, server: Server, completion: Completion, planned: float, seconds: float, *, generated: bool
    ) -> None:
        """Record an answer; see `Usage.record_answer`."""
        self._outage.answered()
        server.health.answered()
        server.rate_limit.answered()
        self._answers += 1
        self.timings.request_duration.observe(seconds)
        server.timings.request_duration.observe(seconds)
        for usage in self._usages(server):
            usage.record_answer(completion, planned, seconds, generated=generated)
        cap = server.limiter.cap
        if generated:
            server.limiter.answered(self._clock(), seconds, completion.completion_tokens)
        else:
            computed = completion.prompt_tokens - completion.cached_tokens
            server.limiter.scored(self._clock(), seconds, computed)
        self._membership.cap_changed(server, cap)

    def unfinished(self, server: Server, seconds: float) -> None:
        """Record a request that ended without its answer `seconds` after it was sent."""
        for usage in self._usages(server):
            usage.record_unfinished(seconds)

    def failed(self, server: Server, error: ServerError, budget: RetryBudget) -> None:
        """Record a failure; it may hold or eject the server."""
        if isinstance(error, RateLimited):
            self.rate_limited(server, error, budget)
            return
        cap = server.limiter.cap
        if isinstance(error, ServerBusy):
            server.health.answered()
            server.limiter.busy(self._clock(), self._rng.random())
            self._outage.refused(asyncio.get_running_loop(), str(error))
            self._membership.cap_changed(server, cap)
            return
        server.limiter.failed()
        for usage in self._usages(server):
            usage.failures += 1
        if isinstance(error, RequestRefused | BrokenResponse):
            server.health.answered()  # it is alive
        elif server.health.failed(reachable=not isinstance(error, ServerUnreachable)):
            self._membership.eject(server, error)

    def rate_limited(self, server: Server, error: RateLimited, budget: RetryBudget) -> None:
        """Hold the server for as long as it asks, or if it refuses several requests in a row.

        A request that is refused while others are answered waits by itself, and does not concern the server.
        """
        now = self._clock()
        server.health.answered()  # it is alive
        if server.rate_limit.take_warning(now):
            log.warning(
                "fleet.rate_limited", server=server.url, error=str(error), pause_s=error.retry_after_s
            )
        had_own_limit = budget.has_own_limit
        budget.rate_limited(now, self._answers, others_are=self._outage.is_refused)
        if budget.has_own_limit:
            self.limited += not had_own_limit
            budget.is_one_of_many = self.limited > self._capacity()
            self.on_room()  # its worker waits, and needs no place
            return
        self._outage.refused(asyncio.get_running_loop(), str(error), error.retry_after_s or 0.0)
        if error.retry_after_s is not None:
            server.limiter.hold(now + error.retry_after_s)
            self._membership.placement.held(server)
        elif server.rate_limit.refused(server.cap):
            cap = server.cap
            server.limiter.busy(now, self._rng.random())
            self._membership.cap_changed(server, cap)

    def _usages(self, server: Server) -> tuple[Usage, ...]:
        """The counters of a server: of all its requests, and of a shared one those of this run, too."""
        if not self._membership.is_shared:
            return (server,)
        return server, self.usage.setdefault(server.url, Usage())
