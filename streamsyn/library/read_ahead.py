"""Backpressure of whoever iterates over samples: assembly waits, and with it all stages before it."""

import threading


class ReadAhead:
    """Holds up assembly while `limit` samples are written that nobody has asked for.

    See `pipeline.delivery.SampleGate`. All methods are for any thread.

    Args:
        limit: Maximum number of such samples; what assembly writes at once may exceed it.
        asked: Number of samples, from the first of the directory, that need not be asked for.
    """

    def __init__(self, limit: int, asked: int = 0) -> None:
        self._limit = limit
        self._asked = asked
        self._is_lifted = False
        self._changed = threading.Condition()

    def ask(self, samples: int) -> None:
        """The first `samples` samples of the run directory have been asked for."""
        with self._changed:
            self._asked = max(self._asked, samples)
            self._changed.notify_all()

    def written(self, samples: int) -> None:
        """Return when fewer than `limit` of the `samples` samples of the directory wait to be asked for."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_lifted or samples - self._asked < self._limit)

    def stop(self) -> None:
        """Hold up nothing any more."""
        with self._changed:
            self._is_lifted = True
            self._changed.notify_all()
