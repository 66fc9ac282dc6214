"""How a daemon that fails is asked again."""

import asyncio
import random
import time
from typing import Final

import structlog

from streamsyn.errors import RateLimited, ServerError

log = structlog.get_logger()

RETRY_S: Final = 300.0
"""Seconds for which a daemon that cannot be reached is tried again, by default."""
FIRST_PAUSE_S: Final = 0.2
"""Pause in seconds before the second try; each further one doubles it."""
_LONGEST_PAUSE_S: Final = 15.0


class Reconnecting:
    """Pauses between the tries, and gives up in the end.

    Args:
        url: What is asked, for logs.
        retry_s: Seconds from the first failure after which the next one is raised.
    """

    def __init__(self, url: str, retry_s: float) -> None:
        self._url = url
        self._retry_s = retry_s
        self._failing_since: float | None = None
        self._tries = 0

    def succeeded(self) -> None:
        """The daemon has answered: failures before do not count any more."""
        self._failing_since, self._tries = None, 0

    async def pause(self, error: ServerError) -> None:
        """Wait before the next try; full jitter, so that readers do not come back all at once.

        Raises:
            ServerError: The tries have lasted too long; it is `error`.
        """
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if self._tries == 0:
            log.warning("follow.interrupted", url=self._url, why=str(error), retry_s=self._retry_s)
        if now - self._failing_since > self._retry_s:
            raise error
        pause_s = min(FIRST_PAUSE_S * 2**self._tries, _LONGEST_PAUSE_S) * random.random()
        if isinstance(error, RateLimited) and error.retry_after_s is not None:
            pause_s += error.retry_after_s
        self._tries = min(self._tries + 1, 30)
        await asyncio.sleep(pause_s)
