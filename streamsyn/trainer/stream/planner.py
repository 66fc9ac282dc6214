"""Decides what each optimizer step trains on, and can resume after any step exactly.

`Planner` reads examples, holds them, and packs some of those held into the rows of a step. The order of the
rows in the stream decides; time matters only where the trainer has to wait for the stream. Each `StepPlan`
carries the state after it: a planner that starts from that state makes the same plans that would have come
next.

`PlanQueue` runs a planner in a thread with an event loop of its own and keeps a few plans ready for the
training.
"""

import asyncio
import math
import queue
import threading
import time
from contextlib import suppress
from itertools import chain
from typing import Any, Protocol, Self

from streamsyn.config.command_sections import TrainSection
from streamsyn.trainer.examples import End, Example, HeldOut, Idle, Key, PackedRow, StepPlan
from streamsyn.trainer.sources.source import Sources
from streamsyn.trainer.stream.packing import Packer, balanced, one_a_row
from streamsyn.trainer.stream.stream_reader import Rendering, StreamReader

_DEPTH = 2
"""Plans that are made ahead of the training."""
_IDLE_EVERY_S = 5.0
"""While the stream has nothing, the planner reports that it is idle this often."""
_TICK_S = 1e-3
"""Shorter waits are skipped."""


class Planner:
    """Makes the plans of a stream. Not safe for two callers at a time.

    A step is packed when `train.shuffle_size` examples are held and fill it, when nothing more has been
    written and `train.shuffle_min` are held, and when the stream has ended or paused.

    Args:
        section: The section `train`.
        run_seed: Seed of the shuffling.
        sources: The stream and what is mixed into it.
        renderer: Turns rows into examples.
        state: The state of the last plan trained on; None at the beginning.
        ranks: Number of ranks; the rows of a plan are ordered so that each rank has the same load.

    Raises:
        ConfigError: The state belongs to a different stream.
    """

    def __init__(
        self,
        section: TrainSection,
        run_seed: int,
        sources: Sources,
        renderer: Rendering,
        state: dict[str, Any] | None = None,
        *,
        ranks: int = 1,
    ) -> None:
        self._section = section
        self._ranks = ranks
        self._reader = StreamReader(section, sources, renderer, state and state["feed"])
        self._packer = Packer(section.rows_per_step, section.seq_len, run_seed, section.shuffle_size)
        self._full_steps: int = state["full_steps"] if state else 0
        """Plans made so far because their rows were full."""
        self._full_tokens: int = state["full_tokens"] if state else 0
        """Tokens of these plans."""
        self._to_restore = state
        self._quiet_s = 0.0
        """Seconds waited since the last example."""
        self._waited_s = 0.0
        """Seconds waited in all."""

    async def next(self, timeout_s: float) -> StepPlan | Idle | End:
        """The next plan; Idle when none can be made within `timeout_s` seconds; End when none will follow.

        Raises:
            StreamsynError: A source cannot be read.
        """
        until = asyncio.get_running_loop().time() + timeout_s
        while True:
            if await self._restore():
                plan = await self._plan()
                if plan is not None:
                    return plan
            if await self._wait(until):
                return Idle(self._quiet_s, self._quiet_s >= self._section.stall_s)

    @property
    def held_out(self) -> list[HeldOut]:
        """What is kept for evaluation so far, in the order of the stream."""
        return self._reader.held_out.samples()

    def statistics(self) -> dict[str, Any]:
        """What was read, what it became, and how many seconds this process has waited for the stream.

        `rows_read`, `examples`, `held_out`, `dropped` (by reason) and `changed` (by the chat template) count
        since the beginning of the stream.
        """
        counts = self._reader.counts
        return {
            "rows_read": counts["read"],
            "examples": counts["examples"],
            "held_out": counts["held_out"],
            "dropped": dict(self._reader.dropped),
            "changed": dict(self._reader.template_changes),
            "held": len(self._packer),
            "waited_s": self._waited_s,
        }

    def close(self) -> None:
        """Close the sources."""
        self._reader.close()

    async def _plan(self) -> StepPlan | End | None:
        """The next plan that can be made of what has been written; None when there is too little."""
        while True:
            if not self._packer.is_full and (example := await self._reader.next()):
                self._packer.put(example)
                self._quiet_s = 0.0
            elif self._may_pack and (rows := self._packer.take()):
                return self._step(rows)
            elif self._has_paused and len(self._packer):
                return self._step(self._packer.flush(), flushed=True)
            else:
                return End(self._state()) if self._reader.ended else None

    @property
    def _has_paused(self) -> bool:
        """Whether the stream has ended, or has brought nothing for `train.max_wait_s`."""
        return self._reader.ended or self._quiet_s >= self._section.max_wait_s

    @property
    def _may_pack(self) -> bool:
        enough = min(self._section.shuffle_min, self._section.shuffle_size)
        return self._has_paused or len(self._packer) >= enough

    async def _wait(self, until: float) -> bool:
        """Wait for the stream until it may have more, or counts as paused; True when the time is up."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        left = until - began
        if left < _TICK_S:
            return True
        to_pause = self._section.max_wait_s - self._quiet_s
        await self._reader.changed(min(left, max(to_pause, _TICK_S)) if to_pause > 0 else left)
        waited = loop.time() - began
        self._quiet_s += waited
        self._waited_s += waited
        return False

    def _step(self, rows: list[PackedRow], *, flushed: bool = False) -> StepPlan:
        tokens = sum(example.length for row in rows for example in row)
        if not flushed:
            self._full_steps += 1
            self._full_tokens += tokens
        if self._section.packing == "none":
            rows = one_a_row(rows, self._ranks)
        usual, counts = self._usual_tokens(), self._reader.counts
        return StepPlan(
            balanced(rows, self._ranks),
            self._state(),
            self._steps_left(),
            flushed,
            fill=min(1.0, tokens / usual) if flushed else 1.0,
            usual_count=None if flushed else usual * counts["examples"] / counts["tokens"],
            usual_targets=usual * counts["targets"] / counts["tokens"]
            if counts["targets"] and not flushed
            else None,
        )

    def _usual_tokens(self) -> float:
        """Tokens of a full step: the mean so far; else as many as its rows hold or the whole stream has."""
        if self._full_steps:
            return self._full_tokens / self._full_steps
        room = self._section.rows_per_step * self._section.seq_len
        return min(room, self._reader.counts["tokens"]) if self._reader.ended else room

    def _steps_left(self) -> int | None:
        """About how many plans remain; None while the end is not known."""
        left = self._reader.examples_left()
        if left is None:
            return None
        counts = self._reader.counts
        tokens = self._packer.tokens + left * counts["tokens"] / max(1, counts["examples"])
        return math.ceil(tokens / self._usual_tokens()) if tokens else 0

    def _state(self) -> dict[str, Any]:
        return {
            "feed": self._reader.state(),
            "held_out": [list(held_out.example.key) for held_out in self.held_out],
            "draws": self._packer.draws,
            "held": [list(key) for key in self._packer.layout()],
            "full_steps": self._full_steps,
            "full_tokens": self._full_tokens,
        }

    async def _restore(self) -> bool:
        """Load again what the checkpoint held; False while a part of it has not been written again.

        Rows may be missing for a while when the run that writes them was killed, too.
        """
        state = self._to_restore
        if state is None:
            return True
        # Earlier versions kept apart what was in open rows, and what had been drawn.
        earlier = [*chain.from_iterable(state.get("rows", ())), *state.get("drawn", ())]
        held = [Key(*key) for key in [*earlier, *state["held"]]]
        held_out = [Key(*key) for key in state["held_out"]]
        found = await self._reader.reload([*held, *held_out])
        if found is None:
            return False
        self._to_restore = None
        made = (found[key] for key in held)
        self._packer.restore((one for one in made if isinstance(one, Example)), state["draws"])
        for key in held_out:
            if isinstance(kept := found[key], HeldOut):
                self._reader.held_out.add(kept)
        return True


class Planning(Protocol):
    """What a `PlanQueue` takes plans from."""

    async def next(self, timeout_s: float) -> StepPlan | Idle | End:
        """The next plan; Idle when there is none yet, End when there will be none."""
        ...

    def statistics(self) -> dict[str, Any]:
        """Counts and times, as of now."""
        ...


class PlanQueue:
    """The plans of a planner that runs ahead in a thread. A context manager: the thread ends with it.

    `get` and `wake` are for the main thread, `wake` also for its signal handlers.

    Attributes:
        idle: Set while the planner waits for its stream.
        statistics: Those of the planner, as of what it returned last.
        waited_s: Seconds that the training has waited in `get`.
    """

    def __init__(self, planner: Planning) -> None:
        self._planner = planner
        self._ready: queue.SimpleQueue[StepPlan | End | BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._room = asyncio.Semaphore(_DEPTH)
        self._started = threading.Event()
        self.idle: Idle | None = None
        self.statistics = planner.statistics()
        self.waited_s = 0.0
        self._at_last_plan = (0.0, 0.0, 0.0)
        """When a plan was taken last: `waited_s`, `stream_waited_s`, and the seconds that the planner had
        waited."""

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None and self._task is not None:
            with suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(timeout=30)

    @property
    def depth(self) -> int:
        """Plans that are ready."""
        return self._ready.qsize()

    @property
    def stream_waited_s(self) -> float:
        """The part of `waited_s` that was due to the stream; in the rest the planner was reading."""
        waited, for_stream, planner_waited = self._at_last_plan
        since = float(self.statistics["waited_s"]) - planner_waited
        return for_stream + max(0.0, min(self.waited_s - waited, since))

    def get(self, timeout_s: float) -> StepPlan | End | None:
        """The next plan; None when there is none within `timeout_s` seconds, or after `wake`.

        Raises:
            StreamsynError: The planner has failed with it.
        """
        began = time.monotonic()
        try:
            found = self._ready.get(timeout=timeout_s)
        except queue.Empty:
            return None
        finally:
            self.waited_s += time.monotonic() - began
        if isinstance(found, BaseException):
            raise found
        self._at_last_plan = (self.waited_s, self.stream_waited_s, float(self.statistics["waited_s"]))
        if isinstance(found, StepPlan) and self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._room.release)
        return found

    def wake(self) -> None:
        """Make a waiting `get` return."""
        self._ready.put(None)

    def _run(self) -> None:
        try:
            asyncio.run(self._fill())
        except asyncio.CancelledError:
            return
        except BaseException as error:  # noqa: BLE001 - raised again in `get`
            self._ready.put(error)
        finally:
            self._started.set()

    async def _fill(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._started.set()
        while True:
            await self._room.acquire()
            made = await self._next()
            self._ready.put(made)
            if isinstance(made, End):
                return

    async def _next(self) -> StepPlan | End:
        while isinstance(made := await self._planner.next(_IDLE_EVERY_S), Idle):
            self.idle = made
            self.statistics = self._planner.statistics()
        self.idle = None
        self.statistics = self._planner.statistics()
        return made
