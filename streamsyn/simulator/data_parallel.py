"""Data-parallel ranks behind one server: an engine each, with its own queue, batch and prefix cache.

Source: srt/managers/data_parallel_controller.py. A request goes to the rank that it names, or to the next in
turn (`--load-balance-method round_robin`, the default); its prompt is not looked at.
"""

from collections.abc import Sequence

from streamsyn.simulator.engine import DuplicateRid, Engine, Load, Work


class DataParallel:
    """Several engines as one. See `Engine`."""

    def __init__(self, ranks: Sequence[Engine]) -> None:
        self._ranks = ranks
        self._engine_of: dict[str, Engine] = {}
        """The engine of each live request, by rid."""
        self._turn = 0

    @property
    def speed(self) -> float:
        return self._ranks[0].speed

    @speed.setter
    def speed(self, speed: float) -> None:
        for rank in self._ranks:
            rank.speed = speed

    @property
    def cache(self) -> "DataParallel":
        return self

    def clear(self) -> None:
        """Empty the cache of each rank."""
        for rank in self._ranks:
            rank.cache.clear()

    @property
    def running(self) -> int:
        return sum(rank.running for rank in self._ranks)

    @property
    def waiting(self) -> int:
        return sum(rank.waiting for rank in self._ranks)

    def enter(self, work: Work) -> None:
        if work.rid in self._engine_of:
            raise DuplicateRid(work.rid)
        engine = self._ranks[self._turn if work.rank is None else work.rank]
        self._turn = (self._turn + (work.rank is None)) % len(self._ranks)
        engine.enter(work)
        self._engine_of[work.rid] = engine

    async def begin(self, work: Work) -> None:
        await self._engine_of[work.rid].begin(work)

    async def write(self, work: Work, tokens: int) -> int:
        return await self._engine_of[work.rid].write(work, tokens)

    def leave(self, work: Work) -> None:
        self._engine_of.pop(work.rid).leave(work)

    def abort(self, rid: str, *, exact: bool) -> int:
        if exact and rid not in self._engine_of:
            return 0
        return sum(rank.abort(rid, exact=False) for rank in self._ranks)

    def abort_all(self) -> int:
        return sum(rank.abort_all() for rank in self._ranks)

    def lose_all(self) -> None:
        for rank in self._ranks:
            rank.lose_all()

    def load(self) -> Load:
        loads = [rank.load() for rank in self._ranks]

        def total(name: str) -> int | None:
            values = [getattr(load, name) for load in loads]
            return None if None in values else sum(values)

        return Load(
            running=sum(load.running for load in loads),
            waiting=sum(load.waiting for load in loads),
            waiting_tokens=sum(load.waiting_tokens for load in loads),
            waiting_uncached_tokens=total("waiting_uncached_tokens"),
            used_tokens=sum(load.used_tokens for load in loads),
            pool_tokens=sum(load.pool_tokens for load in loads),
            max_running_requests=sum(load.max_running_requests for load in loads),
            generated_tokens=total("generated_tokens"),
            prefilled_tokens=total("prefilled_tokens"),
            retracted=sum(load.retracted for load in loads),
            retracted_in_all=sum(load.retracted_in_all for load in loads),
        )
