"""The load on the servers: a closed loop keeps requests in flight, an open loop begins drafts at a rate."""

import asyncio
from collections.abc import Callable, Iterator
from itertools import islice
from random import Random
from typing import Any, Final

from streamsyn.bench.measurement import Load
from streamsyn.config.loading import Config
from streamsyn.pipeline.stages import ProducerStage
from streamsyn.queues import BoundedQueue
from streamsyn.records import Work

_BATCH: Final = 64
"""Drafts that are read at a time."""


def under_load(config: Config, load: Load, *, once: bool = False) -> Config:
    """Return the configuration with the in-flight cap of `load`, and without a limit of seeds unless `once`.

    An open loop without a cap sends every request at once, up to `fleet.max_in_flight`.
    """
    concurrency: Any = load.cap
    if load.rate is not None and load.cap == "auto":
        concurrency = config.fleet.max_in_flight
    most = (
        config.fleet.max_in_flight if concurrency == "auto" else max(config.fleet.max_in_flight, concurrency)
    )
    return config.model_copy(
        update={
            "fleet": config.fleet.model_copy(update={"concurrency": concurrency, "max_in_flight": most}),
            "seeds": config.seeds if once else config.seeds.model_copy(update={"limit": None}),
        }
    )


class RecordedWork:
    """A producer of given drafts, in their order.

    Args:
        drafts: Yields them; may block.
    """

    def __init__(self, drafts: Iterator[Work]) -> None:
        self._drafts = drafts

    async def run(self, work: BoundedQueue[Work]) -> None:
        """Put all drafts on `work`."""
        while batch := await asyncio.to_thread(lambda: list(islice(self._drafts, _BATCH))):
            for draft in batch:
                await work.put(draft)


class OpenLoop:
    """A producer whose drafts arrive at a rate, whatever is in flight: a Poisson process. See `Arrivals`.

    Args:
        rate: Drafts per second.
        rng: Draws the times between arrivals.
        queue_size: Drafts that are read ahead.

    Attributes:
        arrived: Drafts that have arrived.
        on_arrival: Called when a draft has arrived: it needs a worker.
    """

    def __init__(self, rate: float, rng: Random, queue_size: int) -> None:
        self._rate = rate
        self._rng = rng
        self._queue_size = queue_size
        self.arrived = 0
        self.on_arrival: Callable[[], None] = lambda: None
        self._producer: ProducerStage

    def after(self, producer: ProducerStage) -> ProducerStage:
        """See Arrivals."""
        self._producer = producer
        return self

    def workers(self, outcomes: int) -> int:
        """See Arrivals: one for each draft that has arrived and not ended, and one more."""
        return self.arrived - outcomes + 1

    async def run(self, work: BoundedQueue[Work]) -> None:
        """Put drafts on `work` at their times."""
        read: BoundedQueue[Work] = BoundedQueue(self._queue_size)
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(self._producer.run(read), name="producer-reads")
            reading.add_done_callback(lambda _: read.close())
            clock = asyncio.get_running_loop().time
            due = clock()
            async for item in read:
                due += self._rng.expovariate(self._rate)
                await asyncio.sleep(due - clock())
                self.arrived += 1
                self.on_arrival()
                await work.put(item)
