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
from streamsyn.simulator.engine import Engine, ServerLost, Work
from streamsyn.simulator.faults import Fault, FaultPlan, Script
from streamsyn.simulator.plain_engine import PlainEngine
from streamsyn.simulator.prose import Prose
from streamsyn.simulator.settings import PLAIN_CACHE_TOKENS, PLAIN_SLOTS, SimulatorConfig
from streamsyn.simulator.tokens import CHARACTERS_PER_TOKEN, count_tokens
from streamsyn.simulator.weights import Weights

PIECE_TOKENS: Final = 8
"""Tokens in one event of a streamed answer."""

Feed: TypeAlias = Callable[[str], Awaitable[None]]
"""Takes the pieces of a streamed answer as they are written; the first one is empty: the answer begins."""


class Simulation:
    """The server behind its routes: configuration, engine, texts, faults, counters.

    Its clock is that of the running loop, which may be one whose time jumps.
    """

    def __init__(
        self,
        config: SimulatorConfig,
        script: Script | None = None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.dead = False
        """For good."""
        self._down = False
        self._on_death = on_death
        self._connections: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()
        self.engine = self._engine()
        self.weights = Weights(config)
        self.faults = FaultPlan(config.faults, config.seed, script)
        self.stats = Statistics()
        self.started_at = time.time()
        self._looked: tuple[float, int] | None = None
        self._rate = 0.0
        self._prose = Prose(config.seed, config.faithful)
        self._random = Random(f"times {config.seed}")

    def _engine(self) -> Engine:
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
        """How fast it works: 1 is nominal, 0.5 half as fast."""
        return self.engine.speed

    @speed.setter
    def speed(self, speed: float) -> None:
        """At once with batching; with `plain` from the next token (streamed) or request (whole) on.

        Raises:
            ValueError: it is not positive.
        """
        if not speed > 0:
            raise ValueError(f"speed must be positive, not {speed}")
        self.engine.speed = speed

    @property
    def gone(self) -> bool:
        """Dead or down: whoever connects is reset."""
        return self.dead or self._down

    def go_down(self) -> None:
        """As if the process had died: connections are reset, what runs is lost, and so is the cache."""
        self._down = True
        self.engine.lose_all()
        self.weights.restart()
        for transport in list(self._connections):
            transport.abort()

    def come_up(self) -> None:
        """Serves again after `go_down`, with an empty cache."""
        self._down = False

    def die(self) -> None:
        """Goes down for good."""
        self.dead = True
        self._on_death()
        self.go_down()

    def arrive(self) -> bool:
        """Counts a request as come and in flight; False when it finds the server dead."""
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
        """Counts a connection once."""
        if transport not in self._connections:
            self._connections.add(transport)
            self.stats.connections += 1

    def sent(self, answer: Answer) -> None:
        """Counts an answer whose last byte is sent."""
        if answer.aborted:
            self.stats.aborted += 1
            return
        self.stats.answered += 1
        self.stats.prompt_tokens += answer.prompt_tokens
        self.stats.cached_tokens += answer.cached_tokens
        self.stats.completion_tokens += answer.completion_tokens

    def tokens_per_s(self, written: int | None = None) -> float:
        """Tokens written a second since the last look that lies at least a second back.

        `written` is the number so far; without it, answers that are sent count.
        """
        now = asyncio.get_running_loop().time()
        written = self.stats.completion_tokens if written is None else written
        if self._looked is None:
            self._looked = now, written
        at, before = self._looked
        if now - at >= 1:
            self._rate = max(0, written - before) / (now - at)
            self._looked = now, written
        return self._rate

    def reset(self) -> None:
        """Counters, prefix cache, script and faults start again; what is in flight goes on."""
        self.stats = Statistics(in_flight=self.stats.in_flight, max_in_flight=self.stats.in_flight)
        self.engine.cache.clear()
        self.faults.rewind()

    def new_rid(self) -> str:
        """32 hexadecimal digits, as the real server makes them for a request without one."""
        return f"{self._random.getrandbits(128):032x}"

    async def answer(
        self, request: CompletionRequest, fault: Fault | None, feed: Feed | None = None
    ) -> Answer:
        """Runs one request: waits for its turn, takes its time, holds its place until it is complete.

        Raises:
            QueueFull: there was no place for it.
            DuplicateRid: its rid is alive.
            ServerLost: the server went down meanwhile.
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
        """The text that was written until its end or an abort, and how it ended."""
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
    """What `/simulator/stats` tells. `requests` are those to write or score; `by_route` counts all."""

    requests: int = 0
    answered: int = 0
    """Answers sent to the last byte, good or with bad content; tokens are counted for these."""
    aborted: int = 0
    """Requests that were answered with finish_reason "abort"."""
    disconnected: int = 0
    """Requests whose client went away first."""
    connections: int = 0
    """Connections on which at least one request came."""
    retracted: int = 0
    """How often a request was thrown out of the running batch to be computed again."""
    in_flight: int = 0
    max_in_flight: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    by_route: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    @property
    def cache_hit_rate(self) -> float:
        """Share of prompt tokens that came from the prefix cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """A plain copy, ready for JSON."""
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
