"""The process of a coordinator, on this machine: its stdin is a pipe from here, and it drains when that ends.

`cluster.coordinator` has the same for a process on a node of a cluster.
"""

import asyncio
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol, TypeAlias

import structlog

log = structlog.get_logger()

_MAX_LINE_BYTES: Final = 2**24


class CoordinatorProcess(Protocol):
    """A coordinator at work, wherever it runs."""

    @property
    def lost(self) -> str:
        """How it was lost, if not by its own end; known once `lines` ends."""
        ...

    def lines(self) -> AsyncIterator[bytes]:
        """Yield the lines that it logs, to its end."""
        ...

    async def wait(self) -> int:
        """Return its exit code, negative for a signal."""
        ...

    def stop(self, number: int) -> None:
        """Send it a signal, if it runs."""
        ...

    def kill(self) -> None:
        """Kill it, if it runs."""
        ...


Launch: TypeAlias = Callable[[int, bool], Awaitable[CoordinatorProcess]]
"""Starts the coordinator of a partition. The second argument: whether one was lost, which may be alive."""


def arguments(options: Sequence[str], directory: Path) -> list[str]:
    """Return the arguments of `streamsyn run` for a coordinator, which logs JSON lines.

    Args:
        options: What the run was started with, and what differs for this partition.
        directory: Its run directory.
    """
    return [*options, "--out", str(directory), "--log-json", "--no-progress"]


def command_here(options: Sequence[str], directory: Path) -> list[str]:
    """Return the command line of a coordinator on this machine."""
    return [sys.executable, "-m", "streamsyn", "run", *arguments(options, directory), "--tethered"]


def started_here(command: Callable[[int], Sequence[str]]) -> Launch:
    """Return what starts coordinators on this machine.

    Args:
        command: Returns the command line for a partition. It logs JSON lines to stderr, and stops when its
            stdin ends.
    """

    async def launch(at: int, _is_lost: bool) -> CoordinatorProcess:
        process = await asyncio.create_subprocess_exec(
            *command(at),
            stdin=PIPE,
            stderr=PIPE,
            stdout=DEVNULL,
            limit=_MAX_LINE_BYTES,
            process_group=0,  # Ctrl-C is for this process, which passes it on
        )
        log.info("coordinator.started", partition=at, pid=process.pid)
        return _ProcessHere(process)

    return launch


class _ProcessHere:
    """A process of this machine."""

    lost = ""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def lines(self) -> AsyncIterator[bytes]:
        """See `CoordinatorProcess`."""
        assert self._process.stderr is not None, "a pipe"
        async for line in self._process.stderr:
            yield line

    async def wait(self) -> int:
        """See `CoordinatorProcess`."""
        return await self._process.wait()

    def stop(self, number: int) -> None:
        """See `CoordinatorProcess`."""
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """See `CoordinatorProcess`."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
