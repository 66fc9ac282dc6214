"""The coordinators of a run with partitions on the nodes of a Ray cluster, as many as have room for one.

They are told of the servers that Ray places, which all of them use.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from ray.exceptions import RayError

from streamsyn.background import background, in_threads
from streamsyn.cluster.coordinator import STOPPED, PlacedRun, RunCommand
from streamsyn.cluster.placing import connected, one_line
from streamsyn.errors import ConfigError
from streamsyn.fleet.discovery import PlacedServers
from streamsyn.fleet.told_servers import line_of

_OPTIONS = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
_REFUSED = 2
"""The exit code of a run that cannot be started as it is configured."""


class _PlacedCoordinator(PlacedRun):
    """A coordinator on some node: the `CoordinatorProcess` of `pipeline.coordinator_process`."""

    lost = ""

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield the lines that it logs, to its end."""
        rest = b""
        try:
            async for data in self.output():
                *whole, rest = (rest + data).split(b"\n")
                for line in whole:
                    yield line
        except ConfigError as error:
            self.code, self.lost = _REFUSED, str(error)
        except RayError as error:
            if self.code != STOPPED:
                self.lost = one_line(error)
        if rest:
            yield rest

    async def wait(self) -> int:
        """Return its exit code, negative for a signal."""
        return self.code


class PlacedCoordinators:
    """Places coordinators. Made by `placing_coordinators`.

    Args:
        command: Returns the run of a partition.
        servers: The servers to tell them of; None if they have servers of their own.
    """

    def __init__(self, command: Callable[[int], RunCommand], servers: PlacedServers | None) -> None:
        self._command = command
        self._servers = servers
        self._each: dict[int, _PlacedCoordinator] = {}

    async def launch(self, at: int, is_lost: bool) -> _PlacedCoordinator:
        """Place the coordinator of a partition; see `pipeline.coordinator_process.Launch`."""
        command = self._command(at)
        placed = await asyncio.to_thread(
            _PlacedCoordinator,
            command.taking_over() if is_lost else command,
            _OPTIONS,
            is_begun=True,
            servers=self._line(),
            partition=at,
        )
        self._each[at] = placed
        return placed

    async def tell(self, servers: PlacedServers) -> None:
        """Tell all of the servers whenever they change, until cancelled."""
        while True:
            servers.changed.clear()
            for placed in self._each.values():
                placed.tell(self._line())
            await servers.changed.wait()

    def _line(self) -> bytes:
        return b"" if self._servers is None else line_of(self._servers.specs())


@asynccontextmanager
async def placing_coordinators(
    address: str, command: Callable[[int], RunCommand], servers: PlacedServers | None
) -> AsyncIterator[PlacedCoordinators]:
    """Place coordinators on a cluster within the block.

    Args:
        address: The cluster.
        command: Returns the run of a partition, whose `out` is the OUT of all.
        servers: The servers to tell them of; None if they have servers of their own.

    Raises:
        ConfigError: No cluster is at the address.
    """
    coordinators = PlacedCoordinators(command, servers)
    async with in_threads(connected(address)), background() as tasks:
        if servers is not None:
            tasks.start(coordinators.tell(servers), name="tell-servers")
        yield coordinators
