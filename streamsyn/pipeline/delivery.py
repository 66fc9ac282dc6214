"""The last stage: durable contexts in, samples out, to the reader of stdout and to the log.

Samples are derived data: what a kill leaves unfinished is made again from the log, with the same bytes. A
small state file, saved from time to time, means that a resume does not have to read the whole log for that.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from streamsyn.errors import StoppedEarly
from streamsyn.pipeline.stdout import SampleStream
from streamsyn.queues import BoundedQueue
from streamsyn.records import DurableContext, Sample
from streamsyn.sink.log import RunLog
from streamsyn.telemetry import Counters

if TYPE_CHECKING:  # imported by `pipeline.run`, beside the preflight
    from streamsyn.assembly.assembler import Arrangement, Assembler
    from streamsyn.assembly.window import Passage

log = structlog.get_logger()

_BATCH = 64
_STATE_EVERY_BYTES = 16 * 2**20
_DELIVERED_CHARS = 2**16
"""Text delivered at a time. After a kill, a reader of stdout may see this much twice."""
_MARKER = Path("index") / "stdout.open"
"""In the run directory while samples are written to stdout; left behind when the last line may be torn."""


class AssemblyStore(Protocol):
    """The storage that the stage needs. Every method may block."""

    def read_contexts(self, first_seq: int, end_seq: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of contexts from `first_seq` up to, but not including, `end_seq`."""
        ...

    def load_state(self) -> dict[str, Any] | None:
        """Return the state saved last; None if there is none that can be used."""
        ...

    def save_state(self, state: dict[str, Any]) -> None:
        """Save a state, after all samples made before it are on disk."""
        ...


class SampleOutlet(Protocol):
    """Where samples are delivered. `deliver` may block."""

    def deliver(self, samples: Sequence[Sample]) -> None:
        """Deliver samples; when this returns they are recorded as delivered.

        Raises:
            StoppedEarly: The reader is gone.
            SinkError: The samples cannot be written.
        """
        ...

    def stop(self) -> None:
        """Make a `deliver` return that waits for a slow reader. Thread-safe."""
        ...


class NoAssembly:
    """The stage where `assembly.write` is false: contexts are consumed and no samples are made."""

    async def run(self, contexts: BoundedQueue[DurableContext]) -> None:
        """Consume the queue."""
        async for _ in contexts:
            pass

    def stop(self) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def save(self) -> None:
        """Do nothing."""


class AssemblyStage:
    """Makes samples and delivers each of them once.

    Args:
        assembler: Makes a new assembler; called in a thread.
        store: Contexts, and the saved state.
        outlet: Where samples are delivered.
        logged: Contexts in the log at the start.
        delivered: Samples delivered by earlier runs.
        flushes: Numbers of contexts at which earlier streams ended.
        replay: Delivers the samples of earlier runs again, if the reader needs them; called first, in a
            thread. Raises the errors of `outlet.deliver`.
    """

    def __init__(
        self,
        assembler: "Callable[[], Assembler]",
        store: AssemblyStore,
        outlet: SampleOutlet,
        *,
        logged: int,
        delivered: int,
        flushes: Sequence[int],
        replay: Callable[[], None] | None = None,
    ) -> None:
        self._make_assembler = assembler
        self._store = store
        self._outlet = outlet
        self._logged = logged
        self._delivered = delivered
        self._flushes = flushes
        self._replay = replay
        self._unsaved_bytes = 0
        self._stopped = threading.Event()
        self._has_skipped = False

    @cached_property
    def _assembler(self) -> "Assembler":
        """The assembler, which is made in the thread that first needs it."""
        return self._make_assembler()

    async def run(self, contexts: BoundedQueue[DurableContext]) -> None:
        """Catch up with the log, then follow `contexts` to their end."""
        await asyncio.to_thread(self.catch_up)
        async for first in contexts:
            batch = [first, *contexts.get_nowait(_BATCH - 1)]
            if self._stopped.is_set():
                self._has_skipped = True  # consume them, so that the queue can drain
            else:
                await asyncio.to_thread(self._take_contexts, batch)

    def catch_up(self) -> None:
        """Make the samples of the contexts that the log held at the start. Blocks; `run` calls it first."""
        from streamsyn.assembly.window import Passage

        if self._replay is not None:
            self._replay()
        self._restore()
        behind = self._logged - self._assembler.consumed
        if behind > 0:
            log.info("assembly.catching_up", contexts=behind)
        rows = self._store.read_contexts(self._assembler.consumed, self._logged)
        passages = map(Passage.of_row, rows)
        while batch := list(islice(passages, _BATCH)):
            if self._stopped.is_set():
                self._has_skipped = True
                return
            self._take(batch)
        self._emit(self._flushed())

    def stop(self) -> None:
        """Stop making samples; a later run makes the missing ones from the log."""
        self._stopped.set()
        self._outlet.stop()

    def finish(self) -> None:
        """At the end of the stream, in a thread: make the samples that still wait for distractors.

        Raises:
            StoppedEarly: Contexts were skipped after `stop`; a later run makes their samples.
        """
        if self._has_skipped:
            raise StoppedEarly("stopped before every sample was made")
        self._emit(self._assembler.flush())
        if self._assembler.left_out:
            log.info("assembly.left_out", **self._assembler.left_out)
        self.save()

    def save(self) -> None:
        """Save the state, in a thread."""
        self._store.save_state(self._assembler.state().as_dict())
        self._unsaved_bytes = 0

    def _restore(self) -> None:
        from streamsyn.assembly.assembler import AssemblyState
        from streamsyn.assembly.window import Passage

        saved = self._store.load_state()
        if saved is None:
            return
        try:
            state = AssemblyState(**saved)
        except TypeError:  # it has keys that this version does not know: start from the first context
            log.warning("assembly.state_damaged")
            return
        if state.consumed > self._logged or state.samples > self._delivered:
            # The log has lost its end since the state was saved: start from the first context.
            log.warning("assembly.state_ahead", state=state.consumed, logged=self._logged)
            return
        rows = self._store.read_contexts(state.window_start, state.consumed)
        self._assembler.restore(state, map(Passage.of_row, rows))

    def _take_contexts(self, batch: Sequence[DurableContext]) -> None:
        from streamsyn.assembly.window import Passage

        self._take([Passage.of_context(*one) for one in batch])

    def _take(self, passages: "Sequence[Passage]") -> None:
        self._assembler.prepare(passages)
        arranged: list[Arrangement] = []
        for passage in passages:
            arranged += self._flushed()
            arranged += self._assembler.add(passage)
            self._unsaved_bytes += passage.size
        self._emit(arranged)
        if self._unsaved_bytes > _STATE_EVERY_BYTES:
            self.save()

    def _flushed(self) -> "list[Arrangement]":
        """Return the samples that an earlier run made at the end of its stream, if the stream ended here."""
        return self._assembler.flush() if self._assembler.consumed in self._flushes else []

    def _emit(self, arranged: "Sequence[Arrangement]") -> None:
        """Deliver the samples that earlier runs have not, a bounded amount of text at a time."""
        first = self._assembler.samples - len(arranged)
        batch: list[Sample] = []
        size = 0
        for arrangement in arranged[max(0, self._delivered - first) :]:
            batch.append(arrangement.sample())
            size += len(batch[-1].messages[0]["content"])
            if size > _DELIVERED_CHARS:
                self._deliver(batch)
                batch, size = [], 0
        self._deliver(batch)

    def _deliver(self, batch: Sequence[Sample]) -> None:
        if batch:
            self._outlet.deliver(batch)
            self._delivered += len(batch)


class SampleGate(Protocol):
    """Learns how many samples the log holds, and may hold up the run. Called in the thread of assembly."""

    def written(self, samples: int) -> None:
        """The log holds `samples` samples by now. May block: assembly waits, and so does all before it."""
        ...

    def stop(self) -> None:
        """End a `written` that waits, now and from now on; from any thread."""
        ...


class SampleDelivery:
    """Gives samples to the reader of stdout, then records them in the log.

    In this order none is skipped: after a kill in between, the next run gives the reader the sample again.

    Args:
        run_log: The log.
        stream: Stdout, if samples go there.
        counters: Counts the samples.
        gate: Learns of the samples in the log, if anything does.
    """

    def __init__(
        self,
        run_log: RunLog,
        stream: SampleStream | None,
        counters: Counters,
        gate: SampleGate | None = None,
    ) -> None:
        self._log = run_log
        self._stream = stream
        self._counters = counters
        self._gate = gate

    def replay(self) -> None:
        """Give the reader the samples of earlier runs: a reader that was killed may not have all of them."""
        if self._stream is not None:
            self._stream.resume(self._log.root / _MARKER)
            self._stream.write(self._log.read_sample_lines())

    def deliver(self, samples: Sequence[Sample]) -> None:
        """Give samples to the reader, and record them.

        Raises:
            ReaderGone: The reader of stdout has closed its end, or `stop` was called.
            SinkError: Stdout is a file that cannot be written, or the log cannot be.
            TakenOver: A newer process writes to the run directory.
        """
        self._log.epoch.check()
        if self._stream is not None:
            self._stream.resume(self._log.root / _MARKER)
            self._stream.write(self._log.samples.encode(samples))
        self._log.samples.append(samples)
        for sample in samples:
            self._counters.count_sample(sample.n_tokens, sample.target_tokens)
        if self._gate is not None:
            self._gate.written(self._log.samples.rows)

    def stop(self) -> None:
        """End a `deliver` that waits for the reader, from any thread."""
        if self._stream is not None:
            self._stream.stop()
        if self._gate is not None:
            self._gate.stop()
