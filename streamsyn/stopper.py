"""How a run is stopped from outside: by signals, and by a fleet that is gone."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from streamsyn.errors import StoppedEarly
from streamsyn.pipeline import Pipeline


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
