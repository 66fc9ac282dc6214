"""The stream side of rank 0: a thread with an event loop of its own, which keeps a few plans ready."""

import asyncio
import queue
import threading
import time
from contextlib import suppress
from typing import Any, Protocol, Self

from streamsyn.trainer.orders import WAIT_S
from streamsyn.trainer.stream.examples import End, Idle, StepPlan

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
