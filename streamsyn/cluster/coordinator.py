"""A run as an actor of a Ray cluster, started again on another node when it dies with its node.

`submitted` is the driver: a job of Ray, or a command on a machine of the cluster. It places an actor, which
runs `streamsyn run` as a process on its node, prints what that prints, and places another actor when this one
is gone. The new run resumes OUT, which all nodes share, with `--take-over`: what was taken for dead may be
alive.
"""

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import structlog
from ray.exceptions import RayError

from streamsyn.background import in_threads
from streamsyn.cluster.placing import connected, one_line
from streamsyn.errors import ConfigError
from streamsyn.fleet.launch import DIE_WITH_PARENT
from streamsyn.stop_signals import stop_signals

log = structlog.get_logger()

_STOPPED = 75
"""The exit code of a run that stopped early."""
_RESTART_S, _LONGEST_RESTART_S = 1.0, 60.0
"""First and longest pause before a run is started again that was killed before it had printed anything."""
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class RunCommand:
    """A run to be submitted.

    Attributes:
        arguments: Those of `streamsyn run`, with an absolute `--out`.
        out: The run directory.
        folder: Where relative paths of the arguments begin, on each node.
    """

    arguments: tuple[str, ...]
    out: Path
    folder: Path


class Coordinator:
    """The actor: one process of `streamsyn run`, which dies with it.

    Args:
        command: The run.
        resumes: Whether an earlier actor has begun it.
    """

    def __init__(self, command: RunCommand, *, resumes: bool) -> None:
        self._command = command
        self._resumes = resumes
        self._process: Process | None = None
        self._is_stopped = False

    async def run(self) -> AsyncIterator[bytes | int | str]:
        """Run to the end.

        Yields:
            The name of the node first; then what the run prints, as bytes; its exit code at last.

        Raises:
            ConfigError: The files of the run are not on this node.
        """
        node = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
        yield node
        command = self._command
        more: tuple[str, ...] = ()
        if self._resumes:
            if not (command.out / "run.json").exists():
                raise ConfigError(
                    f"{command.out} is not on {node}: it has to be on storage that all nodes share"
                )
            more = ("--take-over",)
        if not command.folder.is_dir():
            raise ConfigError(f"{command.folder} is not on {node}: submit from a folder that all nodes share")
        if not self._is_stopped:
            # In this thread: PR_SET_PDEATHSIG follows the thread that forks.
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid())),
                *(sys.executable, "-m", "streamsyn", "run", *command.arguments, *more),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=PIPE,
                stderr=STDOUT,
                cwd=command.folder,
                start_new_session=True,
            )
            assert self._process.stdout is not None, "a pipe"
            while data := await self._process.stdout.read(_CHUNK_BYTES):
                yield data
        yield _STOPPED if self._process is None else await self._process.wait()

    async def stop(self, number: int) -> None:
        """Pass a signal on to the run: the first one drains it."""
        self._is_stopped = True
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)


async def submitted(
    command: RunCommand,
    address: str,
    write: Callable[[bytes], object],
    placement: dict[str, Any] | None = None,
) -> int:
    """Run to the end on a node of the cluster, and on others when nodes die; return the run's exit code.

    Args:
        command: The run.
        address: The cluster.
        write: Takes what the run prints.
        placement: Further options of the actor; by default it takes one CPU of any node.

    Raises:
        ConfigError: There is no such cluster, or a node lacks the files of the run.
    """
    async with in_threads(connected(address)):
        return await _Driver(command, write, {"num_cpus": 1, **(placement or {})}).run()


class _Driver:
    """Keeps one actor alive until the run has ended."""

    def __init__(
        self, command: RunCommand, write: Callable[[bytes], object], options: dict[str, Any]
    ) -> None:
        self._command = command
        self._write = write
        self._options = options
        self._actor: Any = None
        self._is_placed = False
        self._signalled = asyncio.Event()
        self._has_begun = False
        """Whether a run has printed anything, now or on an earlier node."""
        self._has_printed = False
        """Whether the run of this actor has."""

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in stop_signals():
            loop.add_signal_handler(number, self._stop, number)
        failures = 0
        try:
            while True:
                why = ""
                try:
                    code = await self._attend()
                    if code >= 0:
                        return code
                    why = f"killed by {signal.Signals(-code).name}"
                except RayError as error:
                    if isinstance(cause := getattr(error, "cause", None), ConfigError):
                        raise ConfigError(str(cause)) from None
                    why = one_line(error)
                if self._signalled.is_set():
                    return _STOPPED
                log.warning("coordinator.lost", because=why, then="resumed on another node")
                failures = 0 if self._has_printed else failures + 1
                if failures > 1:
                    await self._pause(min(_LONGEST_RESTART_S, _RESTART_S * 2 ** min(failures, 10)))
        finally:
            for number in stop_signals():
                loop.remove_signal_handler(number)

    async def _attend(self) -> int:
        """Place an actor, and print what its run prints until its end; return its exit code.

        Raises:
            RayError: The actor is gone, or its files are not there.
        """
        remote = ray.remote(Coordinator).options(**self._options)
        self._is_placed = self._has_printed = False
        self._actor = await asyncio.to_thread(remote.remote, self._command, resumes=self._has_begun)
        if self._signalled.is_set():
            return _STOPPED
        answers = self._actor.run.options(num_returns="streaming").remote()
        code = -signal.SIGKILL.value
        async for answer in answers:
            match await answer:
                case bytes(data):
                    self._has_begun = self._has_printed = True
                    self._write(data)
                case str(node):
                    self._is_placed = True
                    log.info("coordinator.placed", node=node)
                case int(code):
                    pass
        return code

    def _stop(self, number: int) -> None:
        self._signalled.set()
        if self._actor is None:
            return
        if self._is_placed:
            self._actor.stop.remote(int(number))
        else:
            ray.kill(self._actor)  # no node has room for it

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._signalled.wait()


def command_of(arguments: Sequence[str], out: Path) -> RunCommand:
    """Return the run of some arguments of `streamsyn run`; relative paths begin in this process's folder."""
    out = out.absolute()
    return RunCommand((*arguments, "--no-progress", "--out", str(out)), out, Path.cwd())
