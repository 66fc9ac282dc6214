"""The servers of a coordinator that another process has placed: it tells of them in lines on stdin."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import IO, Any, Final

import orjson

from streamsyn.background import background
from streamsyn.fleet.discovery import Demand
from streamsyn.fleet.server_spec import ServerSpec

_MAX_LINE_BYTES: Final = 2**24


class ToldServers:
    """The servers that were told last. Made by `told_servers`.

    Attributes:
        changed: See `PlacedServers`.
        demand: See `PlacedServers`.
    """

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.demand: Callable[[], Demand] = lambda: Demand(0, 1, {})
        self._specs: list[ServerSpec] = []

    def specs(self) -> list[ServerSpec]:
        """See `PlacedServers`."""
        return self._specs

    async def follow(self, lines: asyncio.StreamReader, told: asyncio.Event) -> None:
        """Take each line until they end, and set `told` once it lists a server."""
        async for line in lines:
            self._specs = [ServerSpec(**one) for one in orjson.loads(line)]
            self.changed.set()
            if self._specs:
                told.set()


@asynccontextmanager
async def told_servers(pipe: IO[Any]) -> AsyncIterator[ToldServers]:
    """Follow the servers that another process tells of through a pipe; the block begins when there is one.

    Args:
        pipe: Where lines of `line_of` arrive.
    """
    reader, told, servers = asyncio.StreamReader(_MAX_LINE_BYTES), asyncio.Event(), ToldServers()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    try:
        async with background() as tasks:
            tasks.start(servers.follow(reader, told), name="told-servers")
            await told.wait()
            yield servers
    finally:
        transport.close()


def line_of(specs: Iterable[ServerSpec]) -> bytes:
    """Return the line that tells of servers."""
    return orjson.dumps(list(specs), option=orjson.OPT_APPEND_NEWLINE)
