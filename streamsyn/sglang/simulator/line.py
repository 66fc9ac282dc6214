"""What comes to the simulator and how its answer leaves, whatever carries them."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from streamsyn.sglang.simulator.wire import Reply


class Asked(NamedTuple):
    """A request as it arrives."""

    method: str
    path: str
    query: Mapping[str, str]
    authorization: str
    content_type: str
    body: bytes


class Line(Protocol):
    """The way back to the client: a connection, or a call within the process.

    Sending raises ConnectionError, or the task is cancelled, when the client has gone.
    """

    async def send(self, reply: Reply) -> None:
        """The whole answer."""
        ...

    async def stream(self, data: bytes) -> None:
        """The next part of a streamed answer; the first part brings the status, 200."""
        ...

    async def end(self) -> None:
        """The streamed answer is complete."""
        ...

    async def cut(self, reply: Reply | None = None) -> None:
        """Closes before the answer is complete: half-way through `reply`, or in the stream where it is."""
        ...

    def reset(self) -> None:
        """Resets the connection, wherever the answer is."""
        ...
