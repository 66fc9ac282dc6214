"""The daemon without HTTP: its directory, its servers and its runs, in one event loop.

ROOT -> [lock] -> servers -> runs -> (tasks of runs)
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from aiohttp import web

from streamsyn.background import Background, background, in_threads
from streamsyn.config.loading import Config
from streamsyn.daemon.access import Access
from streamsyn.daemon.batches import Batches
from streamsyn.daemon.disk_space import DiskWatch, RetentionTask
from streamsyn.daemon.execution import Hosting
from streamsyn.daemon.hosted_run import HostedRun
from streamsyn.daemon.problems import Problem
from streamsyn.daemon.root import opened_root, read_edits, save_edits
from streamsyn.daemon.runs import Runs
from streamsyn.daemon.stored_files import Files
from streamsyn.daemon.tail import Streams
from streamsyn.daemon.webhooks import open_webhooks
from streamsyn.fleet.membership import Connect
from streamsyn.fleet.shared_servers import ServerEdits, Servers, open_servers
from streamsyn.io.process_files import free_files, raise_limit
from streamsyn.pipeline.setup import on_cluster, traces_exported
from streamsyn.sink.epoch import Epoch

_RETRY_AFTER_S: Final = "30"
CHECK_S: Final = 10.0
"""A daemon looks this often whether a newer one serves its directory."""


@dataclass(slots=True)
class Daemon:
    """What request handlers reach by `request.app[DAEMON]`.

    Attributes:
        root: ROOT.
        access: Who may do what.
        tasks: Starts tasks that end with the daemon.
        hosting: What the runs share.
        runs: The runs.
        files: The files of batches.
        batches: The batches.
        started_at: When the daemon started, in Unix seconds.
    """

    root: Path
    access: Access
    tasks: Background
    hosting: Hosting
    runs: Runs
    files: Files
    batches: Batches
    started_at: float = field(default_factory=time.time)

    @property
    def config(self) -> Config:
        """The operator's configuration; SIGHUP replaces it."""
        return self.hosting.config

    @property
    def is_ending(self) -> bool:
        """Whether the daemon finishes what is in flight, to end then."""
        return self.hosting.ending

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to do before the daemon ends."""
        return self.hosting.ending and not any(run.is_executed for run in self.hosted())

    @property
    def why_not_ready(self) -> str | None:
        """Why the daemon cannot work; None if it can."""
        if self.is_ending:
            return "the daemon is ending"
        if not self.hosting.servers.usable:
            return "no server can be used; GET /v1/servers shows why, POST /v1/servers adds one"
        return self.hosting.held or None

    def hosted(self) -> list[HostedRun]:
        """All runs that have not ended, also those of batches."""
        return [*self.runs.active, *self.batches.runs.active]

    def hold(self, why: str) -> None:
        """Begin nothing new in any run, for a reason that runs show; "" lets them go on."""
        self.hosting.held = why
        for run in self.hosted():
            if why:
                run.hold(why)
            else:
                run.start()

    def check_room(self) -> None:
        """Refuse what would fill the disk.

        Raises:
            Problem: 507: runs are held because the disk is low.
        """
        if self.hosting.held:
            raise Problem(507, self.hosting.held, headers={"Retry-After": _RETRY_AFTER_S})

    async def drain(self) -> None:
        """Finish what is in flight, for at most `run.drain_timeout_s` seconds, and begin nothing new.

        Runs that were going on go on when the daemon starts again.
        """
        self.hosting.ending = True
        await self.stop_runs("the daemon is ending", self.config.run.drain_timeout_s)

    async def stop_runs(self, why: str, timeout_s: float) -> None:
        """Drain all runs, also those of batches, for at most `timeout_s` seconds; then stop them at once."""
        async with asyncio.TaskGroup() as group:
            for runs in (self.runs, self.batches.runs):
                group.create_task(runs.stop(why, timeout_s), name=f"stop {runs.folder.name}")


DAEMON: Final = web.AppKey("daemon", Daemon)


@asynccontextmanager
async def open_daemon(
    root: Path,
    config: Config,
    environ: Mapping[str, str] = os.environ,
    connect: Connect | None = None,
) -> AsyncIterator[Daemon]:
    """Open ROOT, connect to the servers, and take up the runs.

    At the end of the block runs are drained; if it raises, they are cancelled.

    Args:
        root: ROOT; made if it does not exist.
        config: The operator's configuration.
        environ: The environment, which holds the servers' credentials.
        connect: The transport to servers; None is HTTP.

    Raises:
        ConfigError: ROOT or the configuration cannot be used.
        SinkError: The disk failed.
        TakenOver: A newer daemon serves ROOT.
    """
    async with in_threads(opened_root(root)) as epoch:
        access = await asyncio.to_thread(Access, config.serve.tokens_file)
        async with (
            open_webhooks(
                root / "webhooks",
                environ,
                allow_private=lambda: hosting.config.serve.allow_private_webhooks,
            ) as webhooks,
            traces_exported(config.run.traces) as tracer,
            _opened_servers(root, config, environ, connect) as servers,
            background() as tasks,
        ):
            hosting = Hosting(config, environ, connect, servers, tasks, Streams(), webhooks, epoch, tracer)
            runs, files = Runs(root / "runs", hosting), Files(root / "files")
            batches = Batches(root / "batches", files, hosting)
            daemon = Daemon(root, access, tasks, hosting, runs, files, batches)
            disk = DiskWatch(root, lambda: daemon.config.serve.min_free_bytes, daemon.hold)
            await disk.check()
            await asyncio.to_thread(files.load)
            await runs.open()
            await batches.open()
            tasks.start(disk.watch(), name="low disk")
            tasks.start(_until_taken_over(epoch), name="epoch")
            tasks.start(RetentionTask(runs, lambda: daemon.config.serve).run(), name="retention")
            yield daemon
            await daemon.drain()


async def _until_taken_over(epoch: Epoch) -> None:
    """Look from time to time whether a newer daemon serves ROOT; raise TakenOver when it does."""
    while True:
        await asyncio.sleep(CHECK_S)
        await asyncio.to_thread(epoch.check)


@asynccontextmanager
async def _opened_servers(
    root: Path, config: Config, environ: Mapping[str, str], connect: Connect | None
) -> AsyncIterator[Servers]:
    """The servers of the configuration, with what clients have changed."""
    edits = await asyncio.to_thread(read_edits, root)
    max_sockets = None
    if connect is None:
        free = free_files(raise_limit(), inputs=0)
        max_sockets = max(free // 2, free - config.serve.max_connections)

    async def save(edits: ServerEdits) -> None:
        await asyncio.to_thread(save_edits, root, edits)

    async with AsyncExitStack() as stack:
        placed = None
        if config.cluster.address is not None:
            placed = await stack.enter_async_context(on_cluster(config.cluster, waits=False))
        opening = open_servers(
            config.fleet, environ, connect, max_sockets=max_sockets, edits=edits, save=save, placed=placed
        )
        yield await stack.enter_async_context(opening)
