"""Servers on a cluster that one command keeps for all its measured runs."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from streamsyn.config.command_sections import ClusterSection
from streamsyn.errors import root_cause
from streamsyn.pipeline.setup import on_cluster

if TYPE_CHECKING:
    from streamsyn.cluster.placing import Servers


@dataclass(frozen=True, slots=True)
class KeptServers:
    """Made by `kept_servers`.

    Attributes:
        runner: Runs whatever uses the servers, in their event loop. They are only watched while it does.
        servers: The servers.
    """

    runner: asyncio.Runner
    servers: "Servers"

    def opened(self) -> "nullcontext[Servers]":
        """The servers, as `RunRequest.placed`."""
        return nullcontext(self.servers)


@contextmanager
def kept_servers(section: ClusterSection) -> Iterator[KeptServers]:
    """Place servers, and keep them for the runs within the block.

    Raises:
        ConfigError: Ray is not installed, or no cluster is at the address.
        LaunchError: No server could be started.
    """
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        ready: asyncio.Future[Servers] = loop.create_future()

        async def keep() -> NoReturn:
            async with on_cluster(section) as servers:
                ready.set_result(servers)
                await loop.create_future()
            raise AssertionError("it is cancelled")

        keeping = loop.create_task(keep(), name="bench-servers")
        try:
            runner.run(_first_of(ready, keeping))
            yield KeptServers(runner, ready.result())
        finally:
            keeping.cancel()
            with suppress(asyncio.CancelledError):
                runner.run(_end_of(keeping))


async def _first_of(ready: "asyncio.Future[Servers]", keeping: asyncio.Task[NoReturn]) -> None:
    """Wait until there is a server, or raise why there is none."""
    both: list[asyncio.Future[Any]] = [ready, keeping]
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if keeping.done():
        try:
            keeping.result()
        except BaseExceptionGroup as errors:
            raise root_cause(errors) from None


async def _end_of(keeping: asyncio.Task[NoReturn]) -> None:
    await asyncio.wait([keeping])
