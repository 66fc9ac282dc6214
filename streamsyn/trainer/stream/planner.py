"""What each optimizer step trains on: read, shuffled, packed, and exact about where the stream stands.

The order in which rows arrive decides; the clock does so only where the stream lets the trainer wait.

The stream side of rank 0: a thread with an event loop of its own, which keeps a few plans ready.
"""

import asyncio
import math
import queue
import threading
import time
from collections import deque
from contextlib import suppress
from itertools import chain
from typing import Any, Protocol, Self

from streamsyn.config.train_section import TrainSection
from streamsyn.trainer.commands import WAIT_S
from streamsyn.trainer.examples import End, Example, HeldOut, Idle, Key, StepPlan
from streamsyn.trainer.sources.source import Sources
from streamsyn.trainer.stream.feed import Feed, Rendering
from streamsyn.trainer.stream.packing import Packer, ShuffleBuffer, balanced
from streamsyn.trainer.stream.packing import Row as PackedRow

_TICK_S = 1e-3
"""Waiting for less than this is not waiting."""


class Planner:
    """Makes step plans of a stream. Not for two callers at a time.

    An example is drawn when `train.shuffle_size` are held, when nothing more is there and `train.shuffle_min`
    are held, and when the stream has ended or paused. From the state of a plan another planner, over the
    same sources, goes on behind that plan.

    Args:
        section: The section `train`.
        run_seed: Seeds the shuffling.
        sources: What is read.
        renderer: Makes examples of rows.
        state: That of the last plan that was trained on; None at the beginning.
        ranks: Rows are ordered so that each of so many ranks has the same load.

    Raises:
        ConfigError: The state is that of another stream.
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
        self._feed = Feed(section, sources, renderer, state and state["feed"])
        self._buffer = ShuffleBuffer(section.shuffle_size, run_seed)
        self._packer = Packer(section.rows_per_step, section.seq_len)
        self._drawn: deque[Example] = deque()
        """Drawn, and to be packed before anything else."""
        self._full_steps: int = state["full_steps"] if state else 0
        """Plans so far that came because their rows were full."""
        self._full_tokens: int = state["full_tokens"] if state else 0
        """Their tokens."""
        self._to_restore = state
        self._quiet_s = 0.0
        """Waited since something last came."""
        self.waited_s = 0.0
        """Waited in all."""

    @property
    def left_steps(self) -> int | None:
        """About how many plans are still to come, where the end is known."""
        left = self._feed.examples_left()
        if left is None:
            return None
        counts = self._feed.counts
        held = self._buffer.tokens + self._packer.tokens + sum(one.length for one in self._drawn)
        tokens = held + left * counts["tokens"] / max(1, counts["examples"])
        if not self._full_steps:
            return math.ceil(tokens / (self._section.rows_per_step * self._section.seq_len))
        return math.ceil(tokens * self._full_steps / self._full_tokens)

    @property
    def held_out(self) -> list[HeldOut]:
        """What is kept for evaluation so far, in the order of the stream."""
        return list(self._feed.held_out)

    def figures(self) -> dict[str, Any]:
        """What was read, what became of it, and how long the stream was waited for (by this process).

        `rows_read`, `examples`, `held_out` and `dropped` (by reason) count since the beginning of the stream.
        """
        counts = self._feed.counts
        return {
            "rows_read": counts["read"],
            "examples": counts["examples"],
            "held_out": counts["held_out"],
            "dropped": dict(self._feed.dropped),
            "held": len(self._buffer) + sum(map(len, self._packer.layout())) + len(self._drawn),
            "waited_s": self.waited_s,
        }

    async def next(self, timeout_s: float) -> StepPlan | Idle | End:
        """The next plan; Idle when none can be made for `timeout_s`; End when none will ever be.

        Raises:
            StreamsynError: A source cannot be read.
        """
        until = asyncio.get_running_loop().time() + timeout_s
        while True:
            if await self._restored():
                plan = await self._plan()
                if plan is not None:
                    return plan
            if await self._wait(until):
                return Idle(self._quiet_s, self._quiet_s >= self._section.stall_s)

    def close(self) -> None:
        """Let go of the sources."""
        self._feed.close()

    async def _plan(self) -> StepPlan | End | None:
        """The next plan, made of what is there now."""
        while True:
            if not self._buffer.is_full and (example := await self._feed.next()):
                self._buffer.put(example)
                self._quiet_s = 0.0
            elif self._may_draw():
                drawn = self._drawn.popleft() if self._drawn else self._buffer.draw()
                if rows := self._packer.add(drawn):
                    return self._step(rows)
            elif self._nothing_comes and self._packer.tokens:
                return self._step(self._packer.flush(), flushed=True)
            else:
                return End(self._state()) if self._feed.ended else None

    @property
    def _nothing_comes(self) -> bool:
        """Whether the stream has ended or paused."""
        return self._feed.ended or self._quiet_s >= self._section.max_wait_s

    def _may_draw(self) -> bool:
        if self._drawn:
            return True
        enough = min(self._section.shuffle_min, self._section.shuffle_size)
        return len(self._buffer) >= (1 if self._nothing_comes else enough)

    async def _wait(self, until: float) -> bool:
        """Wait until the stream may have brought something, or is to be taken for paused; True at `until`."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        left = until - began
        if left < _TICK_S:
            return True
        to_pause = self._section.max_wait_s - self._quiet_s
        await self._feed.changed(min(left, max(to_pause, _TICK_S)) if to_pause > 0 else left)
        waited = loop.time() - began
        self._quiet_s += waited
        self.waited_s += waited
        return False

    def _step(self, rows: list[PackedRow], *, flushed: bool = False) -> StepPlan:
        if not flushed:
            self._full_steps += 1
            self._full_tokens += sum(example.length for row in rows for example in row)
        ordered = balanced(rows, self._ranks)
        return StepPlan(ordered, self._state(), self.left_steps, flushed)

    def _state(self) -> dict[str, Any]:
        return {
            "feed": self._feed.state(),
            "held_out": [list(kept.example.key) for kept in self._feed.held_out],
            "draws": self._buffer.draws,
            "held": [list(key) for key in self._buffer.layout()],
            "drawn": [list(example.key) for example in self._drawn],
            "rows": [[list(key) for key in row] for row in self._packer.layout()],
            "full_steps": self._full_steps,
            "full_tokens": self._full_tokens,
        }

    async def _restored(self) -> bool:
        """Read again what was held; False while a part of it is not there, because its writer was killed."""
        state = self._to_restore
        if state is None:
            return True
        held, drawn, kept = ([Key(*key) for key in state[name]] for name in ("held", "drawn", "held_out"))
        rows = [[Key(*key) for key in row] for row in state["rows"]]
        found = await self._feed.again([*held, *drawn, *kept, *chain.from_iterable(rows)])
        if found is None:
            return False
        self._to_restore = None
        examples = {key: made for key, made in found.items() if isinstance(made, Example)}
        layout = [[examples[key] for key in row if key in examples] for row in rows]
        self._buffer.restore([examples[key] for key in held if key in examples], state["draws"])
        if not self._packer.restore(layout):
            self._drawn.extend(chain.from_iterable(layout))
        self._drawn.extend(examples[key] for key in drawn if key in examples)
        made_of = (found[key] for key in kept[: self._section.holdout_samples])
        self._feed.held_out = [made for made in made_of if isinstance(made, HeldOut)]
        return True


DEPTH = 2
"""Plans that are made ahead of the training."""


class Planning(Protocol):
    """What plans come from."""

    async def next(self, timeout_s: float) -> StepPlan | Idle | End:
        """The next plan, or that there is none yet, or that there will be none."""
        ...

    def figures(self) -> dict[str, Any]:
        """Counts and ages to show."""
        ...


class PlanQueue:
    """Plans, in the order in which `planner` makes them. Use it as a context: the thread ends with it.

    `get` and `wake` are for the main thread, `wake` also for its signal handlers.
    """

    def __init__(self, planner: Planning) -> None:
        self._planner = planner
        self._ready: queue.SimpleQueue[StepPlan | End | BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._room = asyncio.Semaphore(DEPTH)
        self._started = threading.Event()
        self.idle: Idle | None = None
        """Set while the planner waits for its stream."""
        self.figures = planner.figures()
        """Those of the planner, as they were when it gave something last; it goes on in its thread."""
        self.waited_s = 0.0
        """Time that the training has waited in `get`."""
        self._settled = (0.0, 0.0, 0.0)
        """When the last plan was taken: `waited_s`, what of it was for the stream, and what the planner had
        waited for its stream by then."""

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None and self._task is not None:
            with suppress(RuntimeError):  # it has come to its end by itself
                self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(timeout=30)

    @property
    def stream_waited_s(self) -> float:
        """What of `waited_s` was for the stream; in the rest the planner was reading and tokenising."""
        waited, for_stream, planner_waited = self._settled
        pending = float(self.figures["waited_s"]) - planner_waited
        return for_stream + max(0.0, min(self.waited_s - waited, pending))

    @property
    def depth(self) -> int:
        """Plans that are ready."""
        return self._ready.qsize()

    def get(self, timeout_s: float) -> StepPlan | End | None:
        """The next plan; None when there is none after `timeout_s`, or when woken.

        Raises:
            StreamsynError: What stopped the planner.
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
        self._settled = (self.waited_s, self.stream_waited_s, float(self.figures["waited_s"]))
        if isinstance(found, StepPlan) and self._loop is not None:
            with suppress(RuntimeError):  # the loop has come to its end
                self._loop.call_soon_threadsafe(self._room.release)
        return found

    def wake(self) -> None:
        """Make a `get` that waits return."""
        self._ready.put(None)

    def _run(self) -> None:
        try:
            asyncio.run(self._plan())
        except asyncio.CancelledError:
            return
        except BaseException as error:  # noqa: BLE001 - it is raised again where plans are asked for
            self._ready.put(error)
        finally:
            self._started.set()

    async def _plan(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._started.set()
        while True:
            await self._room.acquire()
            made = await self._next()
            self._ready.put(made)
            if isinstance(made, End):
                return

    async def _next(self) -> StepPlan | End:
        while isinstance(made := await self._planner.next(WAIT_S), Idle):
            self.idle = made
            self.figures = self._planner.figures()
        self.idle = None
        self.figures = self._planner.figures()
        return made
