"""The stages of a run, connected by queues: run to the end of the seeds, drained, or cancelled."""

import asyncio
from dataclasses import dataclass
from typing import Protocol

import structlog

from streamsyn.errors import ConfigError, StoppedEarly
from streamsyn.pipeline.delivery import AssemblyStage, NoAssembly
from streamsyn.pipeline.workers import WorkerPool
from streamsyn.queues import Backlog, BoundedQueue
from streamsyn.records import DurableContext, Outcome, Work

log = structlog.get_logger()


class ProducerStage(Protocol):
    """The stage that puts drafts on the work queue."""

    async def run(self, work: BoundedQueue[Work], /) -> None:
        """Put all drafts on the queue."""
        ...


class SinkStage(Protocol):
    """The stage that takes outcomes, and calls `results.done()` for each one that needs no room any more."""

    async def run(self, results: Backlog[Outcome], durable: BoundedQueue[DurableContext], /) -> None:
        """Take outcomes until `results` ends."""
        ...


@dataclass(frozen=True, slots=True)
class Queues:
    """How full the queues between the stages are.

    Attributes:
        work: Drafts on the work queue, and its bound.
        work_ended: Whether no drafts will come any more, and none is left there.
        results: Outcomes that wait for the disk or for assembly, and the number at which no draft is begun.
        is_draining: Whether nothing new is begun.
    """

    work: tuple[int, int]
    work_ended: bool
    results: tuple[int, int]
    is_draining: bool


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages of a run, in the order of the flow."""

    producer: ProducerStage
    workers: WorkerPool
    sink: SinkStage
    assembly: AssemblyStage | NoAssembly


class Pipeline:
    """Runs the stages to the end of the seeds, or to an early stop from which a later run resumes.

    Args:
        stages: The stages.
        queue_size: Bound of each queue, in items.
        backlog: Number of outcomes that wait for a sync or for assembly while drafts are still begun.
        drain_timeout_s: How long requests in flight may take to finish after `drain`.
    """

    def __init__(self, stages: Stages, queue_size: int, backlog: int, drain_timeout_s: float) -> None:
        self._stages = stages
        self._drain_timeout_s = drain_timeout_s
        self._work: BoundedQueue[Work] = BoundedQueue(queue_size)
        self._results: Backlog[Outcome] = Backlog(backlog)
        self._durable: BoundedQueue[DurableContext] = BoundedQueue(queue_size)
        self._producing: asyncio.Task[None] | None = None
        self._working: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._why_stopped: str | None = None
        self._unreadable: ConfigError | None = None
        self._discarded = 0
        """Items that a drain removed from the work queue."""
        self._is_cancelled = False
        self._has_ended = False
        """Whether all stages have come to their ends."""
        self._first_error: BaseException | None = None

    async def run(self) -> None:
        """Run to the end. However it ends, no stage is left waiting for anything.

        Raises:
            ConfigError: A source of seeds could not be read to its end; what was read has outcomes.
            StoppedEarly: `drain` or `cancel` left work to a later run, or the reader of stdout is gone.
            BaseException: A SinkError or a bug, possibly in a group: the first error of all stages.
        """
        try:
            async with asyncio.TaskGroup() as group:
                self._start(group)
            self._has_ended = True
        except BaseExceptionGroup:
            if self._first_error is None:
                raise
            raise self._first_error from None
        finally:
            if self._deadline is not None:
                self._deadline.cancel()
            if not self._has_ended:
                self._stages.assembly.stop()  # its thread may wait for a slow reader, whom nobody waits for
        if self._why_stopped is not None and self.leaves_work:
            raise StoppedEarly(self._why_stopped)
        if self._unreadable is not None:
            raise self._unreadable

    @property
    def leaves_work(self) -> bool:
        """Whether the run leaves anything to do for a later run.

        The one place that decides this, from what each stage took and did not finish. A drain that finds
        nothing left is the normal end of the run.
        """
        unread = self._producing is not None and self._producing.cancelled()
        given_up = self._working is not None and self._working.cancelled()
        return (
            unread  # seeds that were not read, or not put on the work queue
            or self._discarded > 0  # drafts that no worker had taken
            or self._stages.workers.left_work  # drafts put down between two of their steps
            or given_up  # drafts in flight
            or self._is_cancelled  # at least samples that assembly did not make
        )

    @property
    def queues(self) -> Queues:
        """How full the queues are now."""
        work, results = self._work, self._results
        return Queues(
            work=(len(work), work.maxsize),
            work_ended=work.closed and not work,
            results=(results.not_done, results.maxsize),
            is_draining=self._why_stopped is not None,
        )

    @property
    def drain_ends_in_s(self) -> float | None:
        """Seconds until what is in flight is given up; None while the pipeline is not draining."""
        return None if self._deadline is None else self._deadline.when() - asyncio.get_running_loop().time()

    def drain(self, why: str) -> None:
        """Start nothing new; let what is in flight finish, for at most `drain_timeout_s`."""
        if self._why_stopped is not None or self._producing is None:
            return
        self._why_stopped = why
        self._producing.cancel()
        self._discarded = self._work.discard()
        self._results.drain()
        self._stages.workers.drain()
        plain = f"{why}: finishing what is in flight, up to {self._drain_timeout_s:g} s"
        if why.startswith("stopped by SIG"):
            plain += "; Ctrl-C again stops now"
        log.info("run.draining", plain=plain, why=why, timeout_s=self._drain_timeout_s)
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._drain_timeout_s, self.cancel, "the drain took too long")

    def cancel(self, why: str) -> None:
        """Give up what is in flight. What has been written stays, and is all that a resume needs."""
        self.drain(why)
        self._is_cancelled = True
        if self._working is not None:
            self._working.cancel()
        self._stages.assembly.stop()

    def _start(self, group: asyncio.TaskGroup) -> None:
        stages = self._stages
        self._producing = group.create_task(self._produce(), name="producer")
        self._working = group.create_task(stages.workers.run(self._work, self._results), name="workers")
        sinking = group.create_task(stages.sink.run(self._results, self._durable), name="sink")
        assembling = group.create_task(self._assemble(), name="assembly")
        self._producing.add_done_callback(lambda _: self._work.close())
        self._working.add_done_callback(lambda _: self._results.close())
        sinking.add_done_callback(lambda _: self._durable.close())
        for task in (self._producing, self._working, sinking, assembling):
            task.add_done_callback(self._note_error)

    def _note_error(self, task: asyncio.Task[None]) -> None:
        if self._first_error is None and not task.cancelled():
            self._first_error = task.exception()

    async def _produce(self) -> None:
        try:
            await self._stages.producer.run(self._work)
        except ConfigError as error:
            self._unreadable = error  # raised at the end: the seeds that were read are finished first

    async def _assemble(self) -> None:
        try:
            await self._stages.assembly.run(self._durable)
        except StoppedEarly as error:
            self.cancel(str(error))
            async for _ in self._durable:
                pass  # they are in the log; the sink must not wait for assembly
