"""Seeds of an iterable on their way into a run's inbox, where they are on disk before the run acts on them.

    iterable -> SeedBuffer -> inbox
    (in a thread, or, if it is asynchronous, in the event loop of the caller)

Whatever waits in the buffer is written together, so that a fast iterable does not cost a sync a seed, and a
slow one does not keep a seed back. At most `_MAX_UNREAD` seeds are in the inbox that the run has not read.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from typing import Any, Final, TypeAlias

from streamsyn.errors import StreamsynError
from streamsyn.seeds.inbox import Inbox
from streamsyn.seeds.submission import Submitted

SeedRows: TypeAlias = Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]]

_BUFFERED: Final = 256
_MAX_UNREAD: Final = 4096


class SeedBuffer:
    """A bounded buffer between the thread or asyncio task that iterates and the thread that writes."""

    def __init__(self, size: int = _BUFFERED) -> None:
        self._size = size
        self._seeds: deque[Mapping[str, Any]] = deque()
        self._is_ended = False
        self._is_stopped = False
        self._changed = threading.Condition()

    def offer(self, seed: Mapping[str, Any]) -> bool:
        """Add a seed if there is room; returns whether there was."""
        with self._changed:
            if len(self._seeds) >= self._size:
                return False
            self._seeds.append(seed)
            self._changed.notify_all()
            return True

    def put(self, seed: Mapping[str, Any]) -> bool:
        """Wait for room and add a seed; False once the buffer is stopped. Blocks."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or len(self._seeds) < self._size)
            return not self._is_stopped and self.offer(seed)

    def take(self) -> list[Mapping[str, Any]]:
        """Wait for seeds and take all; none at the end, or once the buffer is stopped. Blocks."""
        with self._changed:
            self._changed.wait_for(lambda: self._seeds or self._is_ended or self._is_stopped)
            taken = [] if self._is_stopped else list(self._seeds)
            self._seeds.clear()
            self._changed.notify_all()
            return taken

    def end(self) -> None:
        """No more seeds come."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Take no more seeds, and discard those in the buffer."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()


class SeedFeed:
    """Feeds the seeds of an iterable to the inbox of a run.

    Args:
        seeds: The iterable.
        inbox: The inbox.
        closes: Whether to close the inbox at the end of the iterable, so that the run ends.
        on_error: Called when the iterable or the inbox fails; `error` has the exception.

    Attributes:
        inbox: The inbox.
        error: The exception that ended the feed.
        submitted: What became of the seeds so far.
    """

    def __init__(
        self, seeds: SeedRows, inbox: Inbox, *, closes: bool, on_error: Callable[[], None] = lambda: None
    ) -> None:
        self.on_error = on_error
        self.error: Exception | None = None
        self.submitted = Submitted()
        self._seeds = seeds
        self.inbox = inbox
        self._closes = closes
        self._buffer = SeedBuffer()
        self._is_stopped = False
        self._writing = threading.Thread(target=self._write, name="streamsyn-seeds", daemon=True)

    @property
    def is_async(self) -> bool:
        """Whether the iterable is asynchronous."""
        return isinstance(self._seeds, AsyncIterable)

    def start(self, *, iterates: bool = True) -> None:
        """Begin to write, and to iterate unless the caller does: see `iterate`."""
        self._writing.start()
        if iterates:
            # A daemon: an iterable that waits for its next seed cannot be interrupted.
            threading.Thread(target=self._iterate, name="streamsyn-iterates", daemon=True).start()

    async def iterate(self) -> None:
        """Iterate over an asynchronous iterable, in the event loop to which it belongs."""
        assert isinstance(self._seeds, AsyncIterable)
        try:
            async for seed in self._seeds:
                if not (self._buffer.offer(seed) or await asyncio.to_thread(self._buffer.put, seed)):
                    break
        except Exception as error:  # noqa: BLE001 - it is raised to whoever gave the iterable
            self._fail(error)
        finally:
            self._buffer.end()

    def stop(self) -> None:
        """Feed no more."""
        self._is_stopped = True
        self._buffer.stop()
        self.inbox.wake()

    def close(self) -> None:
        """Feed no more, and wait until nothing is being written. Blocks."""
        self.stop()
        if self._writing.ident is not None:
            self._writing.join()

    def _iterate(self) -> None:
        if not isinstance(self._seeds, Iterable):
            asyncio.run(self.iterate())
            return
        try:
            for seed in self._seeds:
                if not self._buffer.put(seed):
                    break
        except Exception as error:  # noqa: BLE001 - it is raised to whoever gave the iterable
            self._fail(error)
        finally:
            self._buffer.end()

    def _write(self) -> None:
        try:
            with self.inbox.submission(keeps_bad=True) as submission:
                while seeds := self._buffer.take():
                    for seed in seeds:
                        submission.add(seed)
                    submission.flush()
                    self.submitted = submission.so_far
                    self.inbox.wait_for_room(_MAX_UNREAD, lambda: self._is_stopped)
            if self._closes and not self._is_stopped and self.error is None:
                self.inbox.close()
        except StreamsynError as error:
            self._buffer.stop()
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.error = self.error or error
        self.on_error()
