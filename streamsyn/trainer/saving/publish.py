"""Publishes weights while training: OUT/weights/, and the servers that load them.

    step_100/   a Hugging Face directory: adapters merged, in the precision that the model had at first
    LATEST      the name of the newest, written last

A server loads a folder under its name as weight version. Each of its answers then carries that version, and
contexts record it as `weight_version`. Servers are updated by a thread that the training does not wait for.
"""

import asyncio
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Protocol, Self

import structlog
from transformers import PreTrainedTokenizerBase

from streamsyn.config.command_sections import PublishSection
from streamsyn.config.sections import FleetSection
from streamsyn.errors import ServerTimeout, ServerUnreachable, SinkError, StreamsynError
from streamsyn.fleet import weight_update
from streamsyn.fleet.server_spec import ServerSpec, base_url, headers_of, server_specs
from streamsyn.fleet.transport import Transport, http_transport, tls_context
from streamsyn.io.durable import write_whole
from streamsyn.plain_text import split_userinfo
from streamsyn.trainer.model.placed import Placed
from streamsyn.trainer.saving.checkpoint import LATEST, remove
from streamsyn.trainer.saving.result import write_result

log = structlog.get_logger()

_FOLDER = "weights"
_NAME = re.compile(r"step_(\d+)")

HURRY_S = 10.0
"""Time left for an update in progress once the training is told to stop."""
_RESUME_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Pauses between attempts to resume a server: while it stays paused, it holds up all its clients."""


class Receiver(Protocol):
    """Does something with publications, in its own time."""

    @property
    def in_use(self) -> set[Path]:
        """Folders that must not be removed yet."""

    def offer(self, folder: Path) -> None:
        """Take up a publication. Returns at once."""

    def hurry(self) -> None:
        """Make `finish` return soon. Safe in a signal handler."""

    def finish(self) -> None:
        """Wait until the last publication has been dealt with, within a limit."""


def step_of(folder: Path) -> int:
    """The step of a publication."""
    return int(folder.name.rpartition("_")[2])


class Publisher:
    """Writes weights and has servers load them. Every rank has one to gather the weights; rank 0 does the
    rest.

    Args:
        out: OUT.
        section: The section `train.publish`.
        fleet: The section `fleet`, for the servers' API keys and TLS.
        tokenizer: Saved with the weights.
        rank: The number of this rank.

    Attributes:
        servers: The servers to update; a context manager, to be entered on rank 0 before `publish`.
        receivers: All that publications are offered to, `servers` among them.

    Raises:
        ConfigError: A server's URL is invalid, or its API key is not in the environment.
    """

    def __init__(
        self,
        out: Path,
        section: PublishSection,
        fleet: FleetSection,
        tokenizer: PreTrainedTokenizerBase,
        rank: int,
    ) -> None:
        self._root = out.resolve() / _FOLDER  # servers have a different working directory
        self._keep = section.keep
        self._tokenizer = tokenizer
        self._rank = rank
        self.servers = Servers(section, fleet)
        self.receivers: list[Receiver] = [self.servers]

    def publish(self, placed: Placed, step: int) -> None:
        """Write the weights after `step` and have servers load them. All ranks must call it.

        Weights that cannot be written are logged and skipped: the training itself does not need them.
        """
        target = self._root / f"step_{step}"
        try:
            write_result(placed, self._tokenizer, target)
            if self._rank != 0:
                return
            write_whole(self._root / LATEST, f"{target.name}\n".encode())
        except (SinkError, OSError) as error:
            log.warning("train.not_published", step=step, error=str(error))
            return
        log.info("train.weights", step=step, path=str(target))
        self._prune(step)
        for receiver in self.receivers:
            receiver.offer(target)

    def finish(self, *, in_a_hurry: bool) -> None:
        """Wait for all receivers, on rank 0."""
        for receiver in self.receivers:
            if in_a_hurry:
                receiver.hurry()
            receiver.finish()

    def _prune(self, newest: int) -> None:
        found = [*self._root.glob("step_*")]
        # The rest was left by a kill, or is of steps that are made again after a restart.
        whole = {int(named[1]): one for one in found if (named := _NAME.fullmatch(one.name))}
        kept = sorted(step for step in whole if step <= newest)[-self._keep :]
        in_use = {folder for receiver in self.receivers for folder in receiver.in_use}
        gone = {*found} - {whole[step] for step in kept} - in_use
        for folder in sorted(gone, key=lambda folder: not folder.suffix):  # what a kill left comes first
            try:
                remove(folder)
            except OSError as error:
                log.warning("train.weights_not_removed", path=str(folder), why=error.strerror)


class Servers:
    """The servers of `train.publish.servers`, updated by a thread. A context manager: the thread ends with
    it, without finishing updates unless `finish` has been called.

    Args:
        section: The section `train.publish`.
        fleet: The section `fleet`, for the servers' API keys and TLS.
        environ: Where the API keys are.

    Raises:
        ConfigError: A server's URL is invalid, or its API key is not in the environment.
    """

    def __init__(
        self, section: PublishSection, fleet: FleetSection, environ: Mapping[str, str] = os.environ
    ) -> None:
        self._section = section
        self._fleet = fleet
        self._headers = server_headers(section.servers, "train.publish.servers", fleet, environ)
        self._tls = tls_context(fleet) if self._headers else None
        self._servers: list[ServerWeights] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="publish", daemon=True)

    def __enter__(self) -> Self:
        if self._headers:
            self._thread.start()
            self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.hurry()
        self.finish()

    @property
    def in_use(self) -> set[Path]:
        """Folders that a server may be reading, or is to read."""
        return {folder for server in self._servers for folder in server.in_use}

    def offer(self, folder: Path) -> None:
        """Have all servers load these weights, once they have finished their current update."""
        self._call(lambda server: server.offer(folder))

    def hurry(self) -> None:
        """Make `finish` return soon. Safe in a signal handler."""
        self._call(ServerWeights.hurry)

    def finish(self) -> None:
        """Wait until all servers have loaded the weights offered last, or have timed out."""
        self._call(ServerWeights.end)
        if self._thread.is_alive():
            self._thread.join()

    def _call(self, method: Callable[["ServerWeights"], None]) -> None:
        def each() -> None:
            for server in self._servers:
                method(server)

        loop = self._loop
        if loop is None or loop.is_closed():
            return
        try:
            loop.call_soon_threadsafe(each)
        except RuntimeError:
            return  # the loop has ended by itself

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        try:
            async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
                for url, headers in self._headers.items():
                    opened = http_transport(
                        url, headers, tls=self._tls, connect_timeout_s=self._fleet.connect_timeout_s
                    )
                    transport = await stack.enter_async_context(opened)
                    server = ServerWeights(url, transport, self._section)
                    self._servers.append(server)
                    group.create_task(server.run(), name=f"publish-{url}")
                self._loop = asyncio.get_running_loop()
                self._ready.set()
        finally:
            self._ready.set()


def server_headers(
    urls: Iterable[str], key: str, fleet: FleetSection, environ: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """The HTTP headers for each server, by URL: with the API key that the server has in `fleet.servers`.

    Args:
        urls: The servers.
        key: The key of the configuration that lists them, for messages.
        fleet: The section `fleet`.
        environ: Where the API keys are.

    Raises:
        ConfigError: A URL is invalid, or an API key is not in the environment.
    """
    known = {spec.url: spec for spec in server_specs(fleet)} if fleet.servers else {}
    headers = {}
    for given in urls:
        url, userinfo = base_url(given, key), split_userinfo(given).userinfo
        spec = known.get(url, ServerSpec(url)) if userinfo is None else ServerSpec(url, userinfo=userinfo)
        headers[url] = headers_of(spec, environ)
    return headers


class ServerWeights:
    """Keeps one server's weights up to date, one update at a time. During an update only the newest offer
    waits.
    """

    def __init__(self, url: str, transport: Transport, section: PublishSection) -> None:
        self._url = url
        self._transport = transport
        self._section = section
        self._wanted: Path | None = None
        self._loading: Path | None = None
        self._changed = asyncio.Event()
        self._deadline: asyncio.Timeout | None = None
        self._ending = self._in_a_hurry = False

    @property
    def in_use(self) -> set[Path]:
        """Folders that the server may read. Safe in any thread."""
        # In this order: a folder that moves from wanted to loading in between is seen twice, not missed.
        return {folder for folder in (self._wanted, self._loading) if folder is not None}

    def offer(self, folder: Path) -> None:
        """Load these weights next."""
        self._wanted = folder
        self._changed.set()

    def end(self) -> None:
        """Load what was offered last, then end."""
        self._ending = True
        self._changed.set()

    def hurry(self) -> None:
        """End soon: drop an update that has not begun, and limit the time of one that has."""
        self._wanted = None
        if self._deadline is not None and not self._deadline.expired():
            soon = asyncio.get_running_loop().time() + HURRY_S
            self._deadline.reschedule(min(soon, self._deadline.when() or soon))
        self._in_a_hurry = True
        self.end()

    async def run(self) -> None:
        """Update the server until `end`."""
        await self._resume(tries=1)  # a training that was killed may have left it paused
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._wanted is not None:
                self._loading, self._wanted = self._wanted, None
                await self.load(self._loading)
                self._loading = None
            if self._ending:
                return

    async def load(self, folder: Path) -> bool:
        """Have the server load these weights now. Returns whether it has; if not, why is logged."""
        mode, timeout_s = self._section.pause, self._section.timeout_s
        clock = asyncio.get_running_loop().time
        began, version, is_paused, is_loaded = clock(), folder.name, False, False
        try:
            async with asyncio.timeout(timeout_s) as self._deadline:
                await weight_update.pause(self._transport, self._url, mode, timeout_s)
                is_paused = True
                await weight_update.load_weights(self._transport, self._url, folder, version, mode, timeout_s)
        except (TimeoutError, ServerTimeout):
            is_paused = True  # it may be
            self._log_failed(
                version, f"{self._url} has not loaded the weights within {clock() - began:.0f} s"
            )
        except StreamsynError as error:
            self._log_failed(version, str(error))
        else:
            is_loaded = True
            log.info("train.published", server=self._url, version=version, seconds=round(clock() - began, 1))
        self._deadline = None
        await self._resume(tries=len(_RESUME_PAUSES_S) if is_paused else 1)
        return is_loaded

    def _log_failed(self, version: str, why: str) -> None:
        log.warning("train.not_published", server=self._url, version=version, error=why)

    async def _resume(self, tries: int) -> None:
        for pause_s in _RESUME_PAUSES_S[:tries]:
            try:
                await weight_update.resume(self._transport, self._url)
            except ServerUnreachable:
                return  # no server is running that could be paused
            except StreamsynError as error:
                if tries > 1:
                    log.warning("train.still_paused", server=self._url, error=str(error))
                if self._in_a_hurry:
                    return
                await asyncio.sleep(pause_s)
            else:
                return
