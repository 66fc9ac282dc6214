"""The stages of a run, connected by bounded queues, and how they are stopped."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import structlog

from streamsyn.assembly.stage import AssemblyStage, NoAssembly
from streamsyn.errors import ConfigError, StoppedEarly
from streamsyn.pipeline.producer import Producer
from streamsyn.pipeline.workers import WorkerPool
from streamsyn.queues import BoundedQueue
from streamsyn.records import Context, Outcome, Work
from streamsyn.sink.writer import OutcomeWriter

log = structlog.get_logger()


class Stopper:
    """What SIGTERM, SIGINT and a fleet that is gone do: before the pipeline is up, and while it runs.

    Args:
        on_second_signal: Called, too, when the second one comes.
    """

    def __init__(self, on_second_signal: Callable[[], None] | None = None) -> None:
        self._on_second_signal = on_second_signal
        self._loop = asyncio.get_running_loop()
        self.pipeline: Pipeline | None = None
        self._main = asyncio.current_task()
        self._signals = 0
        self._early: str | None = None

    @property
    def signalled(self) -> bool:
        """Whether a signal has come."""
        return self._signals > 0

    def drain(self, why: str) -> None:
        """Stop when what is in flight is finished; at once, when nothing is yet. For any thread."""
        with suppress(RuntimeError):  # the run has come to its end meanwhile
            self._loop.call_soon_threadsafe(self._drain, why)

    def cancel(self, why: str) -> None:
        """Stop at once."""
        if self.pipeline is not None:
            self.pipeline.cancel(why)
        elif self._main is not None:
            self._early = why
            self._main.cancel()

    @contextmanager
    def signals(self) -> Iterator[None]:
        """The first signal drains, the second cancels."""
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            loop.add_signal_handler(number, self._on_signal, number.name)
        try:
            yield
        except asyncio.CancelledError:
            if self._early is None:
                raise
            raise StoppedEarly(self._early) from None
        finally:
            for number, earlier in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, earlier)

    def _on_signal(self, name: str) -> None:
        self._signals += 1
        if self._signals == 1:
            self._drain(f"stopped by {name}")
            return
        self.cancel(f"stopped by {name}")
        if self._signals == 2 and self._on_second_signal is not None:
            self._on_second_signal()

    def _drain(self, why: str) -> None:
        if self.pipeline is not None:
            self.pipeline.drain(why)
        else:
            self.cancel(why)


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages of a run, in the order of the flow."""

    producer: Producer
    workers: WorkerPool
    sink: OutcomeWriter
    assembly: AssemblyStage | NoAssembly


class Pipeline:
    """Runs the stages to the end of the seeds, or to an early stop that a later run goes on from.

    Args:
        stages: The stages.
        queue_size: Bound of each queue.
        drain_timeout_s: How long requests in flight may take to finish after `drain`.
    """

    def __init__(self, stages: Stages, queue_size: int, drain_timeout_s: float) -> None:
        self._stages = stages
        self._drain_timeout_s = drain_timeout_s
        self._work: BoundedQueue[Work] = BoundedQueue(queue_size)
        self._results: BoundedQueue[Outcome] = BoundedQueue(queue_size)
        self._durable: BoundedQueue[tuple[int, Context]] = BoundedQueue(queue_size)
        self._producing: asyncio.Task[None] | None = None
        self._working: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._why_stopped: str | None = None
        self._left_work = False
        self._unreadable: ConfigError | None = None

    async def run(self) -> None:
        """Run to the end.

        Raises:
            ConfigError: A source of seeds could not be read to its end; what was read has outcomes.
            StoppedEarly: `drain` or `cancel` left something to do, or the reader of stdout is gone.
            BaseExceptionGroup: A SinkError, or a bug.
        """
        async with asyncio.TaskGroup() as group:
            self._producing = group.create_task(self._produce(), name="producer")
            self._working = group.create_task(
                self._stages.workers.run(self._work, self._results), name="workers"
            )
            sinking = group.create_task(self._stages.sink.run(self._results, self._durable), name="sink")
            group.create_task(self._assemble(), name="assembly")
            self._producing.add_done_callback(lambda _: self._work.close())
            self._working.add_done_callback(lambda _: self._results.close())
            sinking.add_done_callback(lambda _: self._durable.close())
        if self._deadline is not None:
            self._deadline.cancel()
        left_work = self._left_work or self._stages.workers.left_work
        left_work = left_work or self._producing.cancelled() or self._working.cancelled()
        if self._why_stopped is not None and left_work:
            raise StoppedEarly(self._why_stopped)
        if self._unreadable is not None:
            raise self._unreadable

    def drain(self, why: str) -> None:
        """Start nothing new; let what is in flight finish, for `drain_timeout_s` at most."""
        if self._why_stopped is not None or self._producing is None:
            return
        self._why_stopped = why
        self._producing.cancel()
        self._left_work = self._work.discard() > 0
        self._stages.workers.drain()
        log.info("run.draining", why=why, timeout_s=self._drain_timeout_s)
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._drain_timeout_s, self.cancel, "the drain took too long")

    def cancel(self, why: str) -> None:
        """Give up what is in flight; what has been written stays, and is all that a resume needs."""
        self.drain(why)
        self._left_work = True  # at the least the samples that assembly will not make
        if self._working is not None:
            self._working.cancel()
        self._stages.assembly.stop()

    async def _produce(self) -> None:
        try:
            await self._stages.producer.run(self._work)
        except ConfigError as error:
            self._unreadable = error  # raised at the end: what has been read is finished first

    async def _assemble(self) -> None:
        try:
            await self._stages.assembly.run(self._durable)
        except StoppedEarly as error:
            self._left_work = True
            self.cancel(str(error))
            async for _ in self._durable:
                pass  # the log has them; the sink must not wait for us
