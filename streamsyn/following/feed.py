"""What `Follower` reads from: the protocol of a directory and of a daemon's URL."""

from typing import Any, Protocol, TypeAlias

from streamsyn.errors import ConfigError

Batch: TypeAlias = list[dict[str, Any]]


class Feed(Protocol):
    """Rows of one run in order, in batches that fit into memory.

    Raises (all reads):
        RunReplaced: A different run is in the place of the one that was read; `restart` makes it the one.
        StreamsynError: The rows cannot be read.
    """

    @property
    def run(self) -> float | None:
        """When the run was created, in Unix seconds, which identifies it; None while there is none."""
        ...

    def read(self, first: int) -> Batch | None:
        """Wait for row `first`; returns it and rows behind it, or None if the run has ended before it."""
        ...

    async def aread(self, first: int) -> Batch | None:
        """As `read`, for the event loop. It can be cancelled and called again."""
        ...

    def restart(self) -> None:
        """Read the run that is there by now."""
        ...

    def close(self) -> None:
        """Close what is open. May be called more than once."""
        ...


def check_after(place: str, first: int, total: int) -> None:
    """Refuse a position behind the end of a run.

    Raises:
        ConfigError: The run has fewer rows than were read before.
    """
    if first > total:
        raise ConfigError(
            f"{place} has ended with {total} rows, but `after` is {first - 1}: it belongs to a different run"
        )
