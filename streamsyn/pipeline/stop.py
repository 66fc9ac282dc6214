"""How a run is stopped before its end: by a signal, by a fleet that is gone, or by the training beside it."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

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
    def signals(self) -> Iterator[None]:
        """Within the block, the first signal drains and a second SIGTERM or SIGINT cancels.

        Raises:
            StoppedEarly: The run was stopped before the pipeline was set up.
        """
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in stop_signals()}
        for number in before:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        except asyncio.CancelledError:
            if self._cancelled_setup is None:
                raise
            raise StoppedEarly(self._cancelled_setup) from None
        finally:
            for number, earlier in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, earlier)

    def drain(self, why: str) -> None:
        """Start nothing new, and stop once what is in flight is finished. May be called from any thread."""
        with suppress(RuntimeError):  # the run has ended meanwhile
            self._loop.call_soon_threadsafe(self._drain, why)

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
