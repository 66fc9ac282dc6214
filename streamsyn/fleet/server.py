"""The state of one server: client, limiter, health, ranks, counters, timings, and the requests that wait.

`placement`, `membership` and `fleet` change it.
"""

import asyncio
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final, Literal

import structlog

from streamsyn.errors import ConfigError, ServerError
from streamsyn.fleet.client import ServerClient
from streamsyn.fleet.discovery import warn_about_router
from streamsyn.fleet.health import Health, RateLimit
from streamsyn.fleet.kv_pool import NOTHING, Expected, Footprint
from streamsyn.fleet.limiter import Limiter
from streamsyn.fleet.prefixes import PrefixModel, PrefixWarmUp
from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.fleet.shares import Share
from streamsyn.fleet.wire import Load
from streamsyn.records import Completion

log = structlog.get_logger()

BOUNDS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the buckets in seconds; one more has all that is longer."""
_MAX_SHOWN = 20
"""Models that are shown of a server of which none is used yet."""


class WaitQueue:
    """Requests that wait: of each share in order of arrival. Those that wait no more are dropped on sight.

    Attributes:
        size: Number of requests, those that wait no more included.
    """

    __slots__ = ("_lines", "size")

    def __init__(self) -> None:
        self._lines: dict[Share, deque[Waiter]] = {}
        self.size = 0

    def __iter__(self) -> "Iterator[Waiter]":
        for line in self._lines.values():
            yield from line

    def append(self, waiter: "Waiter") -> None:
        """Add a request that comes after the others of its share."""
        self._line_of(waiter).append(waiter)

    def appendleft(self, waiter: "Waiter") -> None:
        """Add a request that comes before the others of its share."""
        self._line_of(waiter).appendleft(waiter)

    def _line_of(self, waiter: "Waiter") -> "deque[Waiter]":
        waiter.queue = self
        self.size += 1
        line = self._lines.get(waiter.share)
        if line is None:
            line = self._lines[waiter.share] = deque()
        return line

    def heads(self) -> "list[Waiter]":
        """Return the first request of each share."""
        if not self.size:
            return []
        found, ended = [], []
        for share, line in self._lines.items():
            while line and line[0].turn.done():
                line.popleft()
                self.size -= 1
            if line:
                found.append(line[0])
            else:
                ended.append(share)
        for share in ended:
            del self._lines[share]
        return found

    def remove(self, waiter: "Waiter") -> None:
        """Take a request out."""
        line = self._lines[waiter.share]
        if line[0] is waiter:
            line.popleft()
        else:
            line.remove(waiter)
        self.size -= 1

    def take_all(self) -> "list[Waiter]":
        """Take all requests out, and return them in order of arrival."""
        found = sorted(self, key=lambda waiter: waiter.number)
        self._lines.clear()
        self.size = 0
        return found


class Histogram:
    """Counts durations in buckets."""

    __slots__ = ("_counts", "total_s")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self.total_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration."""
        self._counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Return for each upper bound how many durations were at most that long; the last one is `+Inf`."""
        bounds = [*map(str, BOUNDS_S), "+Inf"]
        return list(zip(bounds, accumulate(self._counts), strict=True))

    @property
    def count(self) -> int:
        """Number of durations."""
        return sum(self._counts)


@dataclass(slots=True, eq=False)
class Timings:
    """How long the requests of a run, or those at a server, took.

    Attributes:
        queue_wait: Until there was a place at a server, each try counted.
        time_to_first_token: From sending to the first token, of the answers that are streamed: those of
            requests that bring a shared prefix into a cache.
        request_duration: From sending to the whole answer.
    """

    queue_wait: Histogram = field(default_factory=Histogram)
    time_to_first_token: Histogram = field(default_factory=Histogram)
    request_duration: Histogram = field(default_factory=Histogram)


@dataclass(slots=True, eq=False, kw_only=True)
class Usage:
    """Counters of what a server was asked and has answered."""

    completions: int = 0
    completion_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cached_host_tokens: int = 0
    cached_storage_tokens: int = 0
    failures: int = 0
    """Tries that failed; full queues and rate limits are none."""
    planned_cached_tokens: float = 0.0
    unfinished: int = 0
    """Requests that ended without their answer after the server had begun it: aborted, timed out, broken."""
    unfinished_s: float = 0.0
    _answered_s: float = 0.0
    _answered_tokens: int = 0

    def record_answer(
        self, completion: Completion, planned: float, seconds: float, *, generated: bool
    ) -> None:
        """Add an answer to the counters.

        Args:
            completion: The answer.
            planned: Part of the prompt that should have been in the prefix cache, 0 to 1.
            seconds: From sending the request to the end of the answer.
            generated: Whether it was written; a scored answer is only read.
        """
        self.completions += 1
        self.completion_tokens += completion.completion_tokens
        self.prompt_tokens += completion.prompt_tokens
        self.cached_tokens += completion.cached_tokens
        self.cached_host_tokens += completion.cached_host_tokens
        self.cached_storage_tokens += completion.cached_storage_tokens
        self.planned_cached_tokens += planned * completion.prompt_tokens
        if generated:
            self._answered_s += seconds
            self._answered_tokens += completion.completion_tokens

    def record_unfinished(self, seconds: float) -> None:
        """Add a request that ended without its answer `seconds` after it was sent."""
        self.unfinished += 1
        self.unfinished_s += seconds

    @property
    def unfinished_tokens(self) -> int:
        """Tokens written for unfinished answers, estimated from the tokens per second of whole ones.

        No server reports them: the answer that would carry them never comes.
        """
        return round(self.unfinished_s * self._answered_tokens / self._answered_s) if self._answered_s else 0

    def counts(self) -> dict[str, int]:
        """Return the counters."""
        return {
            "unfinished": self.unfinished,
            "unfinished_tokens": self.unfinished_tokens,
            "completions": self.completions,
            "failures": self.failures,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "cached_host_tokens": self.cached_host_tokens,
            "cached_storage_tokens": self.cached_storage_tokens,
            "planned_cached_tokens": round(self.planned_cached_tokens),
        }


@dataclass(slots=True, eq=False)
class Rank:
    """A part of a server with a prefix cache of its own: one of its data-parallel ranks, or all of it.

    Attributes:
        server: The server.
        number: Its number there.
        in_flight: Requests in flight at it.
        groups: Number of prefix groups that belong here, of those of its server.
        warm_up: Shared prefixes in its cache, and the requests that wait for one.
        prefixes: What its prefix cache should hold.
    """

    server: "Server"
    number: int = 0
    in_flight: int = 0
    groups: int = 0
    warm_up: "PrefixWarmUp[Waiter]" = field(default_factory=PrefixWarmUp)
    prefixes: PrefixModel = field(default_factory=PrefixModel)

    @property
    def url(self) -> str:
        """Names it among the ranks of all servers."""
        return f"{self.server.url}#{self.number}"

    @property
    def weight(self) -> float:
        """All ranks of a server are alike."""
        return 1.0

    @property
    def routed(self) -> int | None:
        """The rank that its requests name; None for any, where there are none to choose from."""
        ranks = len(self.server.ranks)  # fewer than before if it was started anew
        return self.number if ranks > max(1, self.number) else None

    @property
    def assigned(self) -> int:
        """Requests in flight here, or waiting for a leader here."""
        return self.in_flight + self.warm_up.followers

    @property
    def cap(self) -> float:
        """Its part of the server's cap."""
        return self.server.cap / len(self.server.ranks)


@dataclass(slots=True, eq=False)
class Server(Usage):
    """The state of one server.

    Attributes:
        spec: Its URL, weight and credentials.
        client: Sends requests to it.
        limiter: How many requests it may have in flight.
        health: Whether it is ejected.
        rate_limit: Its 429s.
        served: The models that it serves; empty until it has said so.
        models: Those of them that it is used for.
        ranks: Its data-parallel ranks; one where they cannot be told apart.
        queue: Requests that wait for a place here, since their group belongs here.
        groups: Number of prefix groups that belong here.
        aborts: Requests to abort that it has not answered.
        draining: It gets no new requests.
        is_removed: It is no longer wanted; it stays until its last request has ended.
        load: Its last load metrics.
        weight_version: Version of its weights when it was asked last; only answers that are not streamed
            report it themselves.
        logged_cap: The cap that was logged last.
        error: Why it is not usable; None if it is.
        timings: How long its requests took.
    """

    spec: ServerSpec
    client: ServerClient
    limiter: Limiter
    health: Health
    rate_limit: RateLimit = field(default_factory=RateLimit)
    served: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    ranks: list[Rank] = field(init=False)
    queue: WaitQueue = field(default_factory=WaitQueue)
    groups: int = 0
    aborts: "set[asyncio.Task[None]]" = field(default_factory=set)
    draining: bool = False
    is_removed: bool = False
    load: Load | None = None
    weight_version: str | None = None
    logged_cap: int = 0
    error: str | None = None
    timings: Timings = field(default_factory=Timings)

    def __post_init__(self) -> None:
        self.split(1)

    def split(self, ranks: int) -> None:
        """Tell `ranks` ranks apart from now on, all of them cold."""
        self.ranks = [Rank(self, number) for number in range(ranks)]
        self.resize_pool()

    def resize_pool(self) -> None:
        """Have each rank hold its part of the KV pool that the server reports."""
        if self.load is not None and self.load.pool_tokens:
            for rank in self.ranks:
                rank.prefixes.resize(self.load.pool_tokens // len(self.ranks))

    @property
    def url(self) -> str:
        """Base URL."""
        return self.client.url

    @property
    def weight(self) -> float:
        """Its share of the requests relative to the other servers."""
        return self.spec.weight

    @property
    def is_usable(self) -> bool:
        """Whether it gets new requests: neither ejected nor draining."""
        return not self.health.ejected and not self.draining

    @property
    def state(self) -> Literal["usable", "starting", "ejected", "draining", "removing"]:
        """What it is doing, in a word; `starting` has not answered yet."""
        if self.is_removed:
            return "removing"
        if self.draining:
            return "draining"
        if self.health.ejected:
            return "ejected" if self.served else "starting"
        return "usable"

    @property
    def assigned(self) -> int:
        """Requests in flight here, or waiting for this server."""
        return self.limiter.in_flight + self.queue.size + self.followers

    @property
    def followers(self) -> int:
        """Requests that wait for a leader at one of its ranks."""
        return sum(rank.warm_up.followers for rank in self.ranks)

    @property
    def cap(self) -> int:
        """Maximum requests in flight."""
        return self.limiter.cap

    async def ask_models(self) -> list[str]:
        """Return the models it serves; also ask what is asked once per start.

        That is whether it is a router, the version of its weights, and, of a server, what it can do.

        Raises:
            ServerError: It is not healthy.
            ConfigError: It does not accept the key.
        """
        models = await self.client.models()
        router = await warn_about_router(self.url, self.client.transport)
        try:
            self.weight_version = await self.client.weight_version()
            if router is None:
                await self.client.ask_features()
        except (ServerError, ConfigError) as error:
            log.debug("fleet.features_unknown", server=self.url, error=str(error))
        return models

    async def abort(self, rid: str) -> None:
        """Abort the request with this rid, if the server answers."""
        try:
            await self.client.abort(rid)
        except ServerError as error:
            log.debug("fleet.abort_failed", server=self.url, rid=rid, error=str(error))

    async def current_weights(self) -> str | None:
        """Ask for the version of its weights: a streamed answer does not report it."""
        try:
            self.weight_version = await self.client.weight_version() or self.weight_version
        except ServerError as error:
            log.debug("fleet.weights_unknown", server=self.url, error=str(error))
        return self.weight_version

    def metrics(self) -> dict[str, Any]:
        """Return its current metrics, counters included."""
        load = None if self.health.ejected else self.load  # else it is what it was before it failed
        return {
            "server": self.url,
            "model": ", ".join(self.models or self.served[:_MAX_SHOWN]),
            "weight": self.weight,
            "in_flight": self.limiter.in_flight,
            "cap": self.limiter.cap,
            "last_decision": self.limiter.last_decision,
            "queued": self.queue.size + self.followers,
            "ranks": len(self.ranks),
            "running": load and load.running,
            "max_running": load and (load.max_running or None),
            "waiting": load and load.waiting,
            "waiting_uncached_tokens": load and load.waiting_uncached_tokens,
            "token_usage": load and load.token_usage,
            "generated_per_s": load and load.generated_per_s,
            "ejected": self.health.ejected,
            "draining": self.draining,
            "decisions": dict(self.limiter.decisions),
            **self.counts(),
        }


@dataclass(slots=True, eq=False)
class Place:
    """Permission to have one request in flight at a server; to be released.

    Attributes:
        rank: The server's rank that it is at.
        share: The share of the run that has it.
        model: The model to ask.
        leads: Keys of the prefixes that this request brings into the server's cache.
        expected: Tokens that the request is expected to hold there.
    """

    rank: Rank
    share: Share = field(default_factory=Share)
    model: str = ""
    leads: tuple[str, ...] = ()
    expected: Expected = NOTHING

    @property
    def server(self) -> Server:
        """The server."""
        return self.rank.server


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits for a place.

    Attributes:
        number: Its position in the order of arrival.
        footprint: What is known of the request.
        model: The model that it is for.
        share: The share of its run.
        turn: Resolves to its place.
        avoid: A server to use only if there is no other.
        since: When it began to wait, in seconds of the event loop.
        queue: Where it waits, if in a queue.
    """

    number: int
    footprint: Footprint
    model: str
    share: Share
    turn: asyncio.Future[Place]
    avoid: Server | None
    since: float
    queue: WaitQueue | None = None
