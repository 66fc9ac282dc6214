"""A run that is submitted to a Ray cluster, and placed again on another node when it dies with its node.

`submitted` is the driver: a job of Ray, or a command on a machine of the cluster. It places an actor, prints
what its run prints, and places another actor when this one is gone.
"""

import asyncio
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import structlog
from ray.exceptions import RayError

from streamsyn.background import in_threads
from streamsyn.cluster.coordinator import STOPPED, PlacedRun, RunCommand
from streamsyn.cluster.placing import connected, one_line
from streamsyn.stop_signals import stop_signals

log = structlog.get_logger()

_RESTART_S, _LONGEST_RESTART_S = 1.0, 60.0
"""First and longest pause before a run is started again that was killed before it had printed anything."""


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
        ConfigError: No cluster is at the address, or a node lacks the files of the run.
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
        self._placed: PlacedRun | None = None
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
                    why = one_line(error)
                if self._signalled.is_set():
                    return STOPPED
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
            ConfigError: Its files are not there.
            RayError: The actor is gone.
        """
        self._has_printed = False
        command = self._command.taking_over() if self._has_begun else self._command
        self._placed = await asyncio.to_thread(PlacedRun, command, self._options, is_begun=self._has_begun)
        if self._signalled.is_set():
            self._placed.kill()
            return STOPPED
        async for data in self._placed.output():
            self._has_begun = self._has_printed = True
            self._write(data)
        return self._placed.code

    def _stop(self, number: int) -> None:
        self._signalled.set()
        if self._placed is not None:
            self._placed.stop(number)

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._signalled.wait()
