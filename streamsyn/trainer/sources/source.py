"""What every source of rows can do."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from streamsyn.errors import ConfigError
from streamsyn.trainer.examples import Row


@contextmanager
def path_errors(flag: str, path: object) -> Iterator[None]:
    """Within, what the system says of a path is the user's to mend.

    Raises:
        ConfigError: A path cannot be looked at: names too long, folders that are not ours to read.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from error


class Source(Protocol):
    """Rows that are counted from 0, without gaps, and can be read again: by a later pass, or after a kill.

    `fetch`, `total` and `pick` may block: call them in a thread, one at a time.
    """

    @property
    def name(self) -> str:
        """Stands for the source in keys; the same after a restart."""
        ...

    def fetch(self, first: int, limit: int) -> list[Row]:
        """The rows from `first` on that are there by now, `limit` of them at most.

        Raises:
            StreamsynError: A row that must be there cannot be read; the message names it.
        """
        ...

    def total(self) -> int | None:
        """How many rows there are in all; None as long as more may come."""
        ...

    def pick(self, seqs: Sequence[int]) -> Iterator[Row]:
        """The rows of these numbers, which rise, all of them read before.

        Raises:
            StreamsynError: One cannot be read any more.
        """
        ...

    async def changed(self, timeout_s: float) -> None:
        """Return when there may be more to fetch, and after `timeout_s` at the latest."""
        ...

    def close(self) -> None:
        """Let go of what is open."""
        ...


@dataclass(frozen=True, slots=True)
class Mixed:
    """A source that is read in a cycle, `weight` examples of it for each one of the stream."""

    source: Source
    weight: float


@dataclass(frozen=True, slots=True)
class Sources:
    """The stream, and what is mixed into it."""

    stream: Source
    mix: Sequence[Mixed] = field(default=())
