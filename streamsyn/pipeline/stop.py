"""How a run is stopped before its end: by a signal, by its owner, by a fleet that is gone, or by the training
beside it.
"""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from threading import Lock

from streamsyn.errors import StoppedEarly
from streamsyn.pipeline.stages import Pipeline
from streamsyn.stop_signals import GENTLE, stop_signals


class Stopper:
    """Drains or cancels the pipeline; before there is one, cancels the setting up.

    Args:
        on_second_signal: Called with the second signal, after the pipeline was cancelled.

    Attributes:
        pipeline: The pipeline, once it is set up.
    """

    def __init__(self, on_second_signal: Callable[[], None] | None = None) -> None:
        self.pipeline: Pipeline | None = None
        self._on_second_signal = on_second_signal
        self._loop = asyncio.get_running_loop()
        self._main = asyncio.current_task()
        self._signals = 0
        self._cancelled_setup: str | None = None

    @property
    def signalled(self) -> bool:
        """Whether a signal has arrived."""
        return self._signals > 0

    @property
    def drain_ends_in_s(self) -> float | None:
        """Seconds until what is in flight is given up; None while nothing is draining."""
        return None if self.pipeline is None else self.pipeline.drain_ends_in_s

    @contextmanager
    def stopping(self, *, signals: bool) -> Iterator[None]:
        """Within the block the run can be stopped, also before there is a pipeline.

        Args:
            signals: Handle signals: the first one drains, a second SIGTERM or SIGINT cancels. Only the main
                thread of a process can.

        Raises:
            StoppedEarly: The run was stopped before the pipeline was set up.
        """
        with self._signals_handled() if signals else nullcontext():
            try:
                yield
            except asyncio.CancelledError:
                if self._cancelled_setup is None:
                    raise
                if self._main is not None:
                    self._main.uncancel()
                raise StoppedEarly(self._cancelled_setup) from None

    @contextmanager
    def _signals_handled(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in stop_signals()}
        for number in before:
            self._loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number, earlier in before.items():
                self._loop.remove_signal_handler(number)
                signal.signal(number, earlier)

    def drain(self, why: str) -> None:
        """Start nothing new, and stop once what is in flight is finished. May be called from any thread."""
        self.in_loop(self._drain, why)

    def in_loop(self, stop: Callable[[str], None], why: str) -> None:
        """Call `stop` in the run's event loop, from any thread."""
        with suppress(RuntimeError):  # the run has ended meanwhile
            self._loop.call_soon_threadsafe(stop, why)

    def cancel(self, why: str) -> None:
        """Stop at once."""
        if self.pipeline is not None:
            self.pipeline.cancel(why)
        elif self._main is not None:
            self._cancelled_setup = why
            self._main.cancel()

    def _on_signal(self, number: signal.Signals) -> None:
        if self._signals and number in GENTLE:
            return
        self._signals += 1
        if self._signals == 1:
            self._drain(f"stopped by {number.name}")
            return
        self.cancel(f"stopped by {number.name}")
        if self._signals == 2 and self._on_second_signal is not None:
            self._on_second_signal()

    def _drain(self, why: str) -> None:
        if self.pipeline is not None:
            self.pipeline.drain(why)
        else:
            self.cancel(why)


class RunControl:
    """Stops a run from outside, from any thread. What is asked before the run has begun takes effect then."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._stopper: Stopper | None = None
        self._asked: tuple[bool, str] | None = None
        """Whether to stop at once, and why; what was asked before the run had begun."""

    def drain(self, why: str) -> None:
        """Start nothing new, and stop once what is in flight is finished."""
        self._stop(why, at_once=False)

    def cancel(self, why: str) -> None:
        """Stop at once. What is written stays."""
        self._stop(why, at_once=True)

    @contextmanager
    def of(self, stopper: Stopper) -> Iterator[None]:
        """Within the block, control the run of `stopper`."""
        with self._lock:
            self._stopper = stopper
            asked = self._asked
        if asked is not None:
            self._stop(asked[1], at_once=asked[0])
        try:
            yield
        finally:
            with self._lock:
                self._stopper = None

    def _stop(self, why: str, *, at_once: bool) -> None:
        with self._lock:
            stopper = self._stopper
            if stopper is None:
                self._asked = (at_once, why)
        if stopper is not None:
            stopper.in_loop(stopper.cancel, why) if at_once else stopper.drain(why)
