"""How a run is stopped from outside: by signals, and by a fleet that is gone."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from streamsyn.errors import StoppedEarly
from streamsyn.pipeline import Pipeline


class Stopper:
    """What SIGTERM, SIGINT and a fleet that is gone do: before the pipeline is up, and while it runs."""

    def __init__(self) -> None:
        self.pipeline: Pipeline | None = None
        self._main = asyncio.current_task()
        self._signals = 0
        self._early: str | None = None

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
        if self._signals == 1 and self.pipeline is not None:
            self.pipeline.drain(f"stopped by {name}")
        else:
            self.cancel(f"stopped by {name}")
