"""The servers that are told of new weights, by a thread that the training does not wait for.

OUT/weights/: the model as it is tuned so far, for the servers that write the contexts.

    step_100/   a Hugging Face directory: adapters merged, in the precision the model had at first
    LATEST      the name of the newest, written last

A server loads them under the folder's name, which each of its answers tells from then on, and contexts carry
as `weight_version`.
"""

import asyncio
import os
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

import structlog
from transformers import PreTrainedTokenizerBase

from streamsyn.config.sections import FleetSection, ServerSection
from streamsyn.config.train_section import PublishSection
from streamsyn.errors import ServerTimeout, ServerUnreachable, SinkError, StreamsynError
from streamsyn.fleet import weight_update
from streamsyn.fleet.server import ServerSpec, base_url, headers_of
from streamsyn.fleet.transport import Transport, http_transport, tls_context
from streamsyn.io.durable import write_whole
from streamsyn.trainer.model.adapters import merged
from streamsyn.trainer.model.placed import Placed, whole_weights, write_result
from streamsyn.trainer.saving.checkpoint import LATEST, remove, write_folder

log = structlog.get_logger()

HURRY_S = 10.0
"""What is under way when somebody wants to stop has so long left."""
_CONTINUE_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""A server that stays paused holds up all who ask it, so that it is told more than once."""


class ServerWeights:
    """Keeps one server's weights up to date, one update after the other. What comes while one is under way
    waits; what comes then takes its place.
    """

    def __init__(self, url: str, transport: Transport, section: PublishSection) -> None:
        self._url = url
        self._transport = transport
        self._section = section
        self._wanted: Path | None = None
        self._loading: Path | None = None
        self._news = asyncio.Event()
        self._bound: asyncio.Timeout | None = None
        self._ending = self._hurries = False

    @property
    def in_use(self) -> set[Path]:
        """Directories that it may read; may be asked from any thread."""
        # In this order: one that goes from wanted to loading between the two looks is seen twice, not missed.
        return {folder for folder in (self._wanted, self._loading) if folder is not None}

    def offer(self, folder: Path) -> None:
        """Have it load these next."""
        self._wanted = folder
        self._news.set()

    def end(self) -> None:
        """Load what is wanted yet, and no more."""
        self._ending = True
        self._news.set()

    def hurry(self) -> None:
        """End soon: drop what has not begun, and bound what has."""
        self._wanted = None
        if self._bound is not None and not self._bound.expired():
            soon = asyncio.get_running_loop().time() + HURRY_S
            self._bound.reschedule(min(soon, self._bound.when() or soon))
        self._hurries = True
        self.end()

    async def run(self) -> None:
        """Until `end`."""
        await self._go_on(tries=1)  # a training that was killed may have left it paused
        while True:
            await self._news.wait()
            self._news.clear()
            while self._wanted is not None:
                self._loading, self._wanted = self._wanted, None
                await self._update(self._loading)
                self._loading = None
            if self._ending:
                return

    async def _update(self, folder: Path) -> None:
        mode, timeout_s = self._section.pause, self._section.timeout_s
        clock = asyncio.get_running_loop().time
        began, version, is_paused = clock(), folder.name, False
        try:
            async with asyncio.timeout(timeout_s) as self._bound:
                await weight_update.pause(self._transport, self._url, mode, timeout_s)
                is_paused = True
                await weight_update.load_weights(self._transport, self._url, folder, version, mode, timeout_s)
        except (TimeoutError, ServerTimeout):
            is_paused = True  # for all we know
            self._passed_over(version, f"{self._url} has not loaded them after {clock() - began:.0f} s")
        except StreamsynError as error:
            self._passed_over(version, str(error))
        else:
            log.info("train.published", server=self._url, version=version, seconds=round(clock() - began, 1))
        self._bound = None
        await self._go_on(tries=len(_CONTINUE_PAUSES_S) if is_paused else 1)

    def _passed_over(self, version: str, why: str) -> None:
        log.warning("train.not_published", server=self._url, version=version, error=why)

    async def _go_on(self, tries: int) -> None:
        for pause_s in _CONTINUE_PAUSES_S[:tries]:
            try:
                await weight_update.resume(self._transport, self._url)
            except ServerUnreachable:
                return  # there is no server that could be paused
            except StreamsynError as error:
                if tries > 1:
                    log.warning("train.still_paused", server=self._url, error=str(error))
                if self._hurries:
                    return
                await asyncio.sleep(pause_s)
            else:
                return


class Servers:
    """All servers of `train.publish.servers`. Use it as a context: the thread ends with it, in a hurry unless
    `finish` has been called.

    Args:
        section: `train.publish`.
        fleet: Says which keys they want and how https is checked.
        environ: Holds the keys.

    Raises:
        ConfigError: What stands for a server is no URL, or its key is not to be had.
    """

    def __init__(
        self, section: PublishSection, fleet: FleetSection, environ: Mapping[str, str] = os.environ
    ) -> None:
        self._section = section
        self._fleet = fleet
        self._headers = _headers(section, fleet, environ)
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
        """Directories that some server may be reading, or is to."""
        return {folder for server in self._servers for folder in server.in_use}

    def offer(self, folder: Path) -> None:
        """Have all servers load these weights, when they are done with what they load now."""
        self._tell(lambda server: server.offer(folder))

    def hurry(self) -> None:
        """Make `finish` return soon; may be called by a signal's handler."""
        self._tell(ServerWeights.hurry)

    def finish(self) -> None:
        """Wait until all servers have what was offered last, or their time is up."""
        self._tell(ServerWeights.end)
        if self._thread.is_alive():
            self._thread.join()

    def _tell(self, what: Callable[[ServerWeights], None]) -> None:
        def each() -> None:
            for server in self._servers:
                what(server)

        loop = self._loop
        if loop is None or loop.is_closed():
            return
        try:
            loop.call_soon_threadsafe(each)
        except RuntimeError:
            return  # it has come to its end by itself

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


def _headers(
    section: PublishSection, fleet: FleetSection, environ: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """What is sent to each server, by its URL: its key, named as for the fleet."""
    tables = [server for server in fleet.servers if isinstance(server, ServerSection)]
    keys = {base_url(server.url, "fleet.servers"): server.key_env for server in tables}
    urls = [base_url(url, "train.publish.servers") for url in section.servers]
    return {url: headers_of(ServerSpec(url, key_env=keys.get(url)), environ) for url in urls}


FOLDER = "weights"
_NAME = re.compile(r"step_(\d+)")


class Publisher:
    """Writes weights and has servers load them. Every rank has one, and all of them gather; rank 0 does the
    rest.

    Args:
        out: OUT.
        section: Says how many stay, and which servers there are.
        fleet: Says which keys they want.
        tokenizer: Goes with the weights.
        rank: This one.

    Attributes:
        servers: Those that are told; to be entered, on rank 0, before anything is published.

    Raises:
        ConfigError: What stands for a server is no URL, or its key is not to be had.
    """

    def __init__(
        self,
        out: Path,
        section: PublishSection,
        fleet: FleetSection,
        tokenizer: PreTrainedTokenizerBase,
        rank: int,
    ) -> None:
        self._root = out.resolve() / FOLDER  # servers have another working directory
        self._keep = section.keep
        self._tokenizer = tokenizer
        self._rank = rank
        self.servers = Servers(section, fleet)

    def publish(self, placed: Placed, step: int) -> None:
        """Write the weights after `step`, and have servers told. All ranks call it.

        Weights that cannot be written are said, and passed over: the training needs none of them.
        """
        weights = whole_weights(placed)
        if self._rank != 0:
            return
        target = self._root / f"step_{step}"
        try:
            whole = merged(placed, weights)
            write_folder(target, lambda folder: write_result(*whole, self._tokenizer, folder))
            write_whole(self._root / LATEST, f"{target.name}\n".encode())
        except (SinkError, OSError) as error:
            log.warning("train.not_published", step=step, error=str(error))
            return
        log.info("train.weights", step=step, path=str(target))
        self._prune(step)
        self.servers.offer(target)

    def _prune(self, newest: int) -> None:
        found = [*self._root.glob("step_*")]
        # The others are what a kill left, and of steps that come again: the training began before them.
        whole = {int(named[1]): one for one in found if (named := _NAME.fullmatch(one.name))}
        kept = sorted(step for step in whole if step <= newest)[-self._keep :]
        gone = {*found} - {whole[step] for step in kept} - self.servers.in_use
        for folder in sorted(gone, key=lambda folder: not folder.suffix):  # what a kill left is in the way
            try:
                remove(folder)
            except OSError as error:
                log.warning("train.weights_not_removed", path=str(folder), why=error.strerror)
