import asyncio
import time
import weakref
from collections.abc import Awaitable, Callable
from random import Random
from typing import Final, TypeAlias

from streamsyn.sglang.simulator.answers import ABORTED, ABORTED_WAITING, Answer, compose
from streamsyn.sglang.simulator.asks import Ask
from streamsyn.sglang.simulator.cache import CHARACTERS_A_TOKEN, count_tokens
from streamsyn.sglang.simulator.config import SimulatorConfig
from streamsyn.sglang.simulator.engine import Engine, Work
from streamsyn.sglang.simulator.faults import Fault, FaultPlan, Script
from streamsyn.sglang.simulator.statistics import Statistics
from streamsyn.sglang.simulator.text import Prose

PIECE_TOKENS: Final = 8
"""Tokens in one event of a streamed answer."""

Feed: TypeAlias = Callable[[str], Awaitable[None]]
"""Takes the pieces of a streamed answer as they are written; the first one is empty: the answer begins."""


class Simulation:
    """The server behind its routes: configuration, engine, texts, faults, counters."""

    def __init__(
        self,
        config: SimulatorConfig,
        script: Script | None = None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.dead = False
        self._on_death = on_death
        self._connections: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()
        self.engine = Engine(config.slots, config.queue_limit, config.cache_tokens)
        self.faults = FaultPlan(config.faults, config.seed, script)
        self.stats = Statistics()
        self.started_at = time.time()
        self._looked_at = time.monotonic()
        self._looked_tokens = 0
        self._rate = 0.0
        self._prose = Prose(config.seed)
        self._random = Random(f"times {config.seed}")

    def arrive(self) -> bool:
        """Counts a request as come and in flight; False when it finds the server dead."""
        stats, limit = self.stats, self.config.die_after
        if limit is not None and stats.requests >= limit:
            self._die()
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

    def tokens_per_s(self) -> float:
        """Tokens written a second since the last look that lies at least a second back."""
        now, written = time.monotonic(), self.stats.completion_tokens
        if now - self._looked_at >= 1:
            self._rate = max(0, written - self._looked_tokens) / (now - self._looked_at)
            self._looked_at, self._looked_tokens = now, written
        return self._rate

    def reset(self) -> None:
        """Counters, prefix cache, script and faults start again; what is in flight goes on."""
        self.stats = Statistics(in_flight=self.stats.in_flight, max_in_flight=self.stats.in_flight)
        self.engine.cache.clear()
        self.faults.rewind()

    def new_rid(self) -> str:
        """32 hexadecimal digits, as the real server makes them for a request without one."""
        return f"{self._random.getrandbits(128):032x}"

    async def answer(self, ask: Ask, fault: Fault | None, feed: Feed | None = None) -> Answer:
        """Runs one request: waits for a slot, takes its time, holds the slot until the answer is complete.

        Raises:
            QueueFull: there was no place for it.
            DuplicateRid: its rid is alive.
        """
        began = time.perf_counter()
        work = Work(ask.rid, ask.prompt, ask.reuse_limit)
        self.engine.enter(work)
        try:
            await self.engine.start(work)
            if not work.running:
                return Answer("", ABORTED_WAITING, 0, 0, 0, time.perf_counter() - began)
            text, finish = await self._write(work, ask, fault, feed)
            if work.aborted:
                finish = ABORTED
            seconds = time.perf_counter() - began
            return Answer(text, finish, work.tokens, work.cached_tokens, count_tokens(text), seconds)
        finally:
            self.engine.leave(work)

    async def _write(
        self, work: Work, ask: Ask, fault: Fault | None, feed: Feed | None
    ) -> tuple[str, dict[str, object]]:
        """The text that was written until its end or an abort."""
        if fault is Fault.STALL:
            await self.engine.spend(work, None)
        await self.engine.spend(work, self._first_token_s())
        if work.aborted:
            return "", ABORTED
        self.engine.remember(work)
        text, finish = compose(ask, fault, self._prose, self.config.words)
        if feed is None:
            text = await self._decode_whole(work, text)
        else:
            text = await self._decode_pieces(work, text, feed)
        if text:
            self.engine.remember(work, text)
        return text, finish

    async def _decode_whole(self, work: Work, text: str) -> str:
        began = time.perf_counter()
        total_s = count_tokens(text) * self.config.ms_per_token / 1000
        await self.engine.spend(work, total_s)
        if not work.aborted or not total_s:
            return text
        share = min(1.0, (time.perf_counter() - began) / total_s)
        return text[: int(share * len(text))]

    async def _decode_pieces(self, work: Work, text: str, feed: Feed) -> str:
        await feed("")
        step = PIECE_TOKENS * CHARACTERS_A_TOKEN
        for start in range(0, len(text), step):
            piece = text[start : start + step]
            await self.engine.spend(work, count_tokens(piece) * self.config.ms_per_token / 1000)
            if work.aborted:
                return text[:start]
            await feed(piece)
        return text

    def _die(self) -> None:
        self.dead = True
        self._on_death()
        for transport in list(self._connections):
            transport.abort()

    def _first_token_s(self) -> float:
        jitter = self.config.jitter_ms
        moved = self._random.uniform(-jitter, jitter) if jitter else 0.0
        return max(0.0, self.config.latency_ms + moved) / 1000
