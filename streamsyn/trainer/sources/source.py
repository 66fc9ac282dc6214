"""The protocol of a source of rows, and the stream together with what is mixed into it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from streamsyn.errors import ConfigError
from streamsyn.trainer.examples import Row


@contextmanager
def path_errors(flag: str, path: object) -> Iterator[None]:
    """A context in which an OSError becomes a ConfigError that names the flag and the path.

    Raises:
        ConfigError: The path cannot be used, for example because its name is too long.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from error


class Source(Protocol):
    """Rows numbered from 0 without gaps, which can be read again: in a later pass, or after a restart.

    `fetch`, `total` and `pick` may block: call them in a thread, one at a time.
    """

    @property
    def name(self) -> str:
        """Identifies the source in keys; the same after a restart."""
        ...

    def fetch(self, first: int, limit: int) -> list[Row]:
        """Up to `limit` rows, of the numbers from `first` on, as far as they have been written.

        Raises:
            StreamsynError: A row that must exist cannot be read; the message names it.
        """
        ...

    def total(self) -> int | None:
        """Number of rows; None while more may come."""
        ...

    def pick(self, seqs: Sequence[int]) -> Iterator[Row]:
        """Rows that were read before, by number.

        Args:
            seqs: Their numbers, rising. The rows end before the first that does not exist (yet).

        Raises:
            StreamsynError: A row cannot be read any more.
        """
        ...

    async def changed(self, timeout_s: float) -> None:
        """Return when there may be more rows, and after `timeout_s` seconds at the latest."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


@runtime_checkable
class HasContexts(Protocol):
    """A source that has the contexts of its samples, too."""

    def contexts(self, row: dict[str, Any], seqs: Sequence[int]) -> list[str] | None:
        """The texts of contexts of a sample by their seqs, in any order; None if one is not there any more.
        Blocks.
        """
        ...


@dataclass(frozen=True, slots=True)
class Mixed:
    """A source that is read in an endless cycle: `weight` examples for each example of the stream."""

    source: Source
    weight: float


@dataclass(frozen=True, slots=True)
class Sources:
    """The stream and what is mixed into it."""

    stream: Source
    mix: Sequence[Mixed] = field(default=())
