"""Keeps servers alive on a Ray cluster, and lists those that are.

Each server is an actor in a placement group of its own. Ray tells at once when the actor, its node or the
process of the server is gone. It is not listed from then on, so that no request goes there, and Ray places
another one, on whatever node has room. The fleet treats that as a new server, with an empty cache, even when
it has the same URL: its `incarnation` differs.
"""

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import ray
import structlog
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from streamsyn.background import Background, background, in_threads
from streamsyn.cluster.replica import Announcement, Replica
from streamsyn.cluster.scaling import Scaling
from streamsyn.config.command_sections import ClusterSection
from streamsyn.errors import ConfigError, LaunchError
from streamsyn.fleet.discovery import Demand
from streamsyn.fleet.launch import STOP_TIMEOUT_S
from streamsyn.fleet.server_spec import ServerSpec

log = structlog.get_logger()

_MOST_STARTS = 3
"""Starts in a row that may fail before the run ends, as long as no server has ever been ready."""
_RESTART_S, _LONGEST_RESTART_S = 1.0, 60.0
"""First and longest pause before a server is started again after a failed start."""
_REACH_S = 10.0
"""Time for a connection to the cluster."""
_SCALE_S = 5.0
"""Seconds between two looks at how many servers are needed."""
_WAITING_S = 30.0
"""Seconds without a server after which a log line says so."""


@asynccontextmanager
async def placed(section: ClusterSection, *, waits: bool = True) -> AsyncIterator["Servers"]:
    """Place servers on the cluster, and stop all of them at the end.

    Args:
        section: The `cluster` section of the configuration.
        waits: Whether a server is ready when the body begins.

    Raises:
        ConfigError: `cluster.model` is not set, or there is no cluster at `cluster.address`.
        LaunchError: No server could be started.
    """
    if section.model is None:
        raise ConfigError("cluster.model is not set: pass --model MODEL")
    least, most = section.replicas, section.max_replicas
    if most is not None and most < least:
        raise ConfigError(f"cluster.max_replicas = {most} is less than cluster.replicas = {least}")
    async with in_threads(connected(section.address or "auto")), background() as tasks:
        servers = Servers(section, tasks)
        try:
            servers.begin()
            if waits:
                await servers.ready()
            yield servers
        finally:
            await servers.close()


@contextmanager
def connected(address: str, *, log_to_driver: bool = False) -> Iterator[None]:
    """Connect this process to the cluster, unless it is: then leave it so at the end.

    Args:
        address: `HOST:PORT`, or `auto` for the cluster of this machine or job.
        log_to_driver: Whether what actors write to stderr comes to this process's, too.

    Raises:
        ConfigError: There is no cluster.
    """
    if ray.is_initialized():
        yield
        return
    try:
        _reach(address)
        ray.init(address, namespace="streamsyn", log_to_driver=log_to_driver, configure_logging=False)
    except (OSError, RayError, ValueError, RuntimeError) as error:
        line = str(error).strip().partition("\n")[0]
        raise ConfigError(f"cluster.address: no Ray cluster at {address}: {line}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Connect to `HOST:PORT` and hang up: Ray tries for minutes where nothing listens.

    Raises:
        OSError: Nothing listens there.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_REACH_S).close()


class Servers:
    """The servers that are kept alive. Made by `placed`.

    Attributes:
        changed: See `PlacedServers`.
        demand: See `PlacedServers`.
    """

    def __init__(self, section: ClusterSection, tasks: Background) -> None:
        self.changed = asyncio.Event()
        self.demand: Callable[[], Demand] = lambda: Demand(0, 1, {})
        self._section = section
        self._tasks = tasks
        self._scaling = Scaling(section.replicas, section.max_replicas or section.replicas, section.idle_s)
        self._keepers: dict[str, asyncio.Task[None] | None] = {}
        """What keeps each server alive, by its name, oldest first."""
        self._alive: dict[str, ServerSpec] = {}
        """The servers that are ready, by name."""
        self._leaving: str | None = None
        """The name of the server that gets no more requests, and is stopped once it has answered."""
        self._names = 0
        self._failures: dict[str, str] = {}
        """Why servers cannot be started, by name, since none is ready."""
        self._has_news = asyncio.Event()
        self._scaler: asyncio.Task[None] | None = None

    def specs(self) -> list[ServerSpec]:
        """See `PlacedServers`."""
        return list(self._alive.values())

    def begin(self) -> None:
        """Begin to place servers, and to keep as many of them as there is work for."""
        for _ in range(self._section.replicas):
            self._add()
        self._scaler = self._tasks.start(self._scale(), name="cluster-scale")

    async def ready(self) -> None:
        """Wait for the first server.

        Raises:
            LaunchError: None can be started.
        """
        while not self._alive:
            self._has_news.clear()
            try:
                async with asyncio.timeout(_WAITING_S):
                    await self._has_news.wait()
            except TimeoutError:
                log.info("cluster.waiting", servers=len(self._keepers), each=self._resources())
            if not self._alive and len(self._failures) == len(self._keepers):
                raise LaunchError(next(iter(self._failures.values())))

    async def close(self) -> None:
        """Stop all servers."""
        if self._scaler is not None:
            self._scaler.cancel()
        await self._stop(list(self._keepers))

    def _add(self) -> None:
        self._names += 1
        name = f"server-{self._names}"
        self._keepers[name] = self._tasks.start(self._keep(name), name=f"cluster-{name}")

    async def _stop(self, names: Sequence[str]) -> None:
        """Stop some servers at the same time: their keepers do it when they are cancelled."""
        keepers = [self._keepers.pop(name) for name in names]
        running = [keeper for keeper in keepers if keeper is not None]
        for keeper in running:
            keeper.cancel()
        if running:
            await asyncio.wait(running)

    async def _keep(self, name: str) -> None:
        """Keep one server alive until cancelled, and stop it then."""
        failures = 0
        while True:
            was_ready = False
            try:
                async with self._reserved(name) as ranks:
                    announced = await _started(ranks)
                    was_ready = True
                    why = await self._until_dead(name, ranks, announced)
            except (LaunchError, RayError) as error:
                why = one_line(error)
            failures = 0 if was_ready else failures + 1
            log.warning("cluster.server_lost", name=name, because=why, was_ready=was_ready)
            if failures >= _MOST_STARTS:
                self._failures[name] = why
                self._has_news.set()
            if failures:
                await asyncio.sleep(min(_LONGEST_RESTART_S, _RESTART_S * 2**failures))

    async def _until_dead(self, name: str, ranks: Sequence[Any], announced: Announcement) -> str:
        """List a server until it is dead; return how it died.

        Raises:
            RayActorError: Its actor or its node is gone.
        """
        self._failures.clear()
        self._alive[name] = ServerSpec(announced.url, incarnation=secrets.token_hex(4))
        self.changed.set()
        self._has_news.set()
        log.info("cluster.server_ready", name=name, server=announced.url, node=announced.node)
        try:
            return await _first_end(ranks)
        finally:
            del self._alive[name]
            self.changed.set()

    @asynccontextmanager
    async def _reserved(self, name: str) -> AsyncIterator[list[Any]]:
        """Reserve the nodes of a server: yields an actor for each of its ranks, which Ray may still place."""
        section, nodes = self._section, self._section.nodes_per_replica
        group = await asyncio.to_thread(
            placement_group,
            [self._resources()] * nodes,
            strategy="STRICT_SPREAD" if nodes > 1 else "STRICT_PACK",
        )
        actors: list[Any] = []
        try:
            for rank in range(nodes):
                remote = ray.remote(Replica).options(
                    num_cpus=section.cpus_per_replica,
                    num_gpus=section.gpus_per_replica,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
                )
                actors.append(await asyncio.to_thread(remote.remote, section, name, rank))
            yield actors
        finally:
            await _freed(group, actors)

    def _resources(self) -> dict[str, float]:
        """Return what a server needs on each of its nodes."""
        found = {"CPU": float(self._section.cpus_per_replica), "GPU": float(self._section.gpus_per_replica)}
        return {name: number for name, number in found.items() if number}

    async def _scale(self) -> None:
        """Keep as many servers as there is work for."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(_SCALE_S)
            demand = self.demand()
            if self._leaving is not None:
                await self._let_go(self._leaving, demand)
                continue
            running = len(self._keepers)
            wanted = self._scaling.wanted(running, demand.left, demand.room, clock())
            for _ in range(wanted - running):
                self._add()
            if wanted < running:
                self._leave(next(reversed(self._keepers)))
            if wanted != running:
                log.info("cluster.scaled", servers=wanted, left=demand.left)

    def _leave(self, name: str) -> None:
        """Have a server get no more requests."""
        self._leaving = name
        spec = self._alive.get(name)
        if spec is not None:
            self._alive[name] = ServerSpec(spec.url, draining=True, incarnation=spec.incarnation)
            self.changed.set()

    async def _let_go(self, name: str, demand: Demand) -> None:
        """Stop the server that leaves, once it has answered everything."""
        spec = self._alive.get(name)
        if spec is None or not demand.in_flight.get(spec.url):
            self._leaving = None
            await self._stop([name])


async def _started(ranks: Sequence[Any]) -> Announcement:
    """Start a server on its ranks, once Ray has placed them, and wait until it is ready."""
    head = await ranks[0].meeting_point.remote() if len(ranks) > 1 else ""
    starts = [rank.start.remote(head) for rank in ranks]
    for start in reversed(starts):  # rank 0 is ready when all have met there
        announced: Announcement = await start
    return announced


async def _first_end(ranks: Sequence[Any]) -> str:
    """Wait until the process of a rank has ended; return how.

    Raises:
        RayActorError: An actor is gone.
    """
    ends = [asyncio.wrap_future(rank.ended.remote().future()) for rank in ranks]
    try:
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for end in ends:
            end.cancel()
    why: str = done.pop().result()
    return why


def one_line(error: Exception) -> str:
    """Return what happened: of an error in an actor, its own text without the traceback."""
    cause = getattr(error, "cause", None) or error
    return str(cause).strip().partition("\n")[0]


async def _freed(group: Any, actors: Sequence[Any]) -> None:
    """Stop the processes of a server, then end its actors by force, and free what was reserved."""
    stops = [actor.stop.remote() for actor in actors]
    with suppress(RayError, TimeoutError):
        async with asyncio.timeout(2 * STOP_TIMEOUT_S):
            for stop in stops:
                await stop
    for actor in actors:
        await asyncio.to_thread(ray.kill, actor)
    await asyncio.to_thread(remove_placement_group, group)
