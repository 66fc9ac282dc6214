"""One simulated server: its configuration, engine, texts, faults, weights and counters."""

import asyncio
import time
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, TypeAlias

from streamsyn.simulator.batching import BatchedEngine, Batching
from streamsyn.simulator.completion_request import (
    ABORTED,
    ABORTED_WAITING,
    Answer,
    CompletionRequest,
    Finish,
    compose,
    cut_short,
)
from streamsyn.simulator.data_parallel import DataParallel
from streamsyn.simulator.engine import Engine, ServerLost, Work
from streamsyn.simulator.plain_engine import PlainEngine
from streamsyn.simulator.settings import (
    PLAIN_CACHE_TOKENS,
    PLAIN_SLOTS,
    Fault,
    FaultPlan,
    Script,
    SimulatorConfig,
)
from streamsyn.simulator.texts import CHARACTERS_PER_TOKEN, Prose, count_tokens
from streamsyn.simulator.weights import Weights

PIECE_TOKENS: Final = 8
"""Tokens in one event of a streamed answer."""

Feed: TypeAlias = Callable[[str], Awaitable[None]]
"""Receives the pieces of a streamed answer; the first one is empty and marks its beginning."""


class Simulation:
    """The state of a simulated server behind its routes.

    It uses the clock of the running event loop, which may be virtual.

    Args:
        config: What to simulate.
        script: Faults by hand.
        on_death: Called when the server dies.
    """

    def __init__(
        self,
        config: SimulatorConfig,
        script: Script | None = None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.dead = False
        self._down = False
        self._on_death = on_death
        self._connections: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()
        self.ranks = [self._make_engine() for _ in range(config.dp_size)]
        self.engine: Engine = DataParallel(self.ranks) if config.dp_size > 1 else self.ranks[0]
        self.weights = Weights(config)
        self.faults = FaultPlan(config.faults, config.seed, script)
        self.stats = Statistics()
        self.started_at = time.time()
        self._last_sample: tuple[float, int] | None = None
        self._rate = 0.0
        self._prose = Prose(config.seed, config.faithful)
        self._random = Random(f"times {config.seed}")

    def _make_engine(self) -> Engine:
        config, model = self.config, self.config.batching
        if model is not None:
            machine = Batching(
                model,
                queue_limit=config.queue_limit,
                policy=config.schedule_policy,
                caching=config.cache_tokens != 0,
                speed=config.speed,
            )
            return BatchedEngine(machine)
        slots = PLAIN_SLOTS if config.slots is None else config.slots
        cache_tokens = PLAIN_CACHE_TOKENS if config.cache_tokens is None else config.cache_tokens
        token_s = config.ms_per_token / 1000
        engine = PlainEngine(slots, config.queue_limit, cache_tokens, self._first_token_s, token_s)
        engine.speed = config.speed
        return engine

    @property
    def speed(self) -> float:
        """Speed factor: 1 is nominal, 0.5 half as fast."""
        return self.engine.speed

    @speed.setter
    def speed(self, speed: float) -> None:
        """Takes effect at once with batching; with `plain` from the next streamed piece or request on.

        Raises:
            ValueError: It is not positive.
        """
        if not speed > 0:
            raise ValueError(f"speed must be positive, not {speed}")
        self.engine.speed = speed

    @property
    def gone(self) -> bool:
        """Whether it is down or dead: connections are reset."""
        return self.dead or self._down

    def go_down(self) -> None:
        """Reset connections and lose requests and cache, as if the process had died."""
        self._down = True
        self.engine.lose_all()
        self.weights.restart()
        for transport in list(self._connections):
            transport.abort()

    def come_up(self) -> None:
        """Serve again after `go_down`, with an empty cache."""
        self._down = False

    def die(self) -> None:
        """Go down for ever."""
        self.dead = True
        self._on_death()
        self.go_down()

    def arrive(self) -> bool:
        """Count a request as arrived and in flight. Return False if the server is down or dead."""
        stats, limit = self.stats, self.config.die_after
        if not self.gone and limit is not None and stats.requests >= limit:
            self.die()
        if self.gone:
            return False
        stats.requests += 1
        stats.in_flight += 1
        stats.max_in_flight = max(stats.max_in_flight, stats.in_flight)
        return True

    def connected(self, transport: asyncio.Transport) -> None:
        """Count a connection, once."""
        if transport not in self._connections:
            self._connections.add(transport)
            self.stats.connections += 1

    def sent(self, answer: Answer) -> None:
        """Count an answer whose last byte was sent."""
        if answer.aborted:
            self.stats.aborted += 1
            return
        self.stats.answered += 1
        self.stats.prompt_tokens += answer.prompt_tokens
        self.stats.cached_tokens += answer.cached_tokens
        self.stats.completion_tokens += answer.completion_tokens
        self.stats.answered_s += answer.seconds

    def tokens_per_s(self, written: int | None = None) -> float:
        """Return generated tokens per second, updated at most once a second.

        Args:
            written: Tokens generated so far; None uses those of the answers sent.
        """
        now = asyncio.get_running_loop().time()
        written = self.stats.completion_tokens if written is None else written
        if self._last_sample is None:
            self._last_sample = now, written
        at, before = self._last_sample
        if now - at >= 1:
            self._rate = max(0, written - before) / (now - at)
            self._last_sample = now, written
        return self._rate

    def reset(self) -> None:
        """Reset counters, prefix cache and faults; requests in flight continue."""
        self.stats = Statistics(in_flight=self.stats.in_flight, max_in_flight=self.stats.in_flight)
        self.engine.cache.clear()
        self.faults.rewind()

    def new_rid(self) -> str:
        """Return 32 hexadecimal digits, as the real server does for a request without a rid."""
        return f"{self._random.getrandbits(128):032x}"

    async def answer(
        self, request: CompletionRequest, fault: Fault | None, feed: Feed | None = None
    ) -> Answer:
        """Run one request from the queue to its complete answer.

        Args:
            request: The request.
            fault: The fault that it meets.
            feed: Receives the pieces of a streamed answer; None if not streamed.

        Raises:
            QueueFull: The queue is full.
            DuplicateRid: A live request has its rid.
            ServerLost: The server went down before the answer was complete.
        """
        clock = asyncio.get_running_loop().time
        began, weights = clock(), self.weights
        if weights.mode is not None:
            await weights.enter()
            if self.gone:
                raise ServerLost
        work = Work(
            request.rid,
            request.prompt,
            request.reuse_limit,
            max_new_tokens=request.max_tokens,
            rank=request.rank,
            piece=PIECE_TOKENS if feed else 0,
            stalls=fault is Fault.STALL,
        )
        self.engine.enter(work)
        try:
            with weights.watched(work) as spans:
                work.output, finish = compose(request, fault, self._prose, self.config.words)
                work.target = count_tokens(work.output)
                await self.engine.begin(work)
                if not work.running:
                    waited = clock() - began
                    return Answer("", ABORTED_WAITING, 0, 0, 0, waited, weights=weights.spans([], 0))
                text, finish = await self._write(work, finish, feed)
                if weights.mode is not None:
                    await weights.flow()
                tokens = count_tokens(text)
                return Answer(
                    text,
                    finish,
                    prompt_tokens=work.tokens,
                    cached_tokens=work.cached_tokens,
                    completion_tokens=tokens,
                    seconds=clock() - began,
                    retractions=work.retractions,
                    weights=weights.spans(spans, tokens),
                )
        finally:
            self.engine.leave(work)
            self.stats.retracted += work.retractions

    async def _write(self, work: Work, finish: Finish, feed: Feed | None) -> tuple[str, Finish]:
        """Return the text that was generated until its end or an abort, and its finish reason."""
        whole, text = count_tokens(work.output), work.output
        if feed is None:
            written = await self.engine.write(work, whole)
        elif work.aborted:
            written = await self.engine.write(work, 0)
        else:
            written = await self._write_pieces(work, whole, feed)
        if written < whole:
            text, finish = text[: written * CHARACTERS_PER_TOKEN], cut_short(written)
        return text, ABORTED if work.aborted else finish

    async def _write_pieces(self, work: Work, whole: int, feed: Feed) -> int:
        if self.weights.mode is not None:
            await self.weights.flow()
        await feed("")
        text, written = work.output, 0
        while written < whole:
            goal = min(written + PIECE_TOKENS, whole)
            now = await self.engine.write(work, goal)
            if self.weights.mode is not None:
                await self.weights.flow()
            if now < goal and work.aborted:
                return written
            await feed(text[written * CHARACTERS_PER_TOKEN : now * CHARACTERS_PER_TOKEN])
            if now < goal:
                return now
            written = now
        return written

    def _first_token_s(self) -> float:
        jitter = self.config.jitter_ms
        moved = self._random.uniform(-jitter, jitter) if jitter else 0.0
        return max(0.0, self.config.latency_ms + moved) / 1000 / self.engine.speed


@dataclass(slots=True)
class Statistics:
    """The counters of `/simulator/stats`. `requests` counts generation and scoring, `by_route` everything."""

    requests: int = 0
    answered: int = 0
    """Answers sent to the last byte, bad content included; tokens are counted for these."""
    aborted: int = 0
    """Requests answered with finish_reason "abort"."""
    disconnected: int = 0
    """Requests whose client disconnected first."""
    connections: int = 0
    """Connections with at least one request."""
    retracted: int = 0
    """How often a request was retracted from the running batch."""
    in_flight: int = 0
    max_in_flight: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    answered_s: float = 0.0
    """Seconds of these answers, for `/metrics`."""
    by_route: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    @property
    def cache_hit_rate(self) -> float:
        """Share of prompt tokens from the prefix cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return a copy for JSON."""
        return {
            "requests": self.requests,
            "by_route": dict(self.by_route),
            "answered": self.answered,
            "faults": {str(kind): count for kind, count in self.faults.items()},
            "in_flight": self.in_flight,
            "max_in_flight": self.max_in_flight,
            "connections": self.connections,
            "aborted": self.aborted,
            "disconnected": self.disconnected,
            "retracted": self.retracted,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
        }
