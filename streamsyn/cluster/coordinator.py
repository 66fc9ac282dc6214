"""A run as an actor of a Ray cluster: a process of `streamsyn run` on some node, which dies with its actor.

A run that is placed again, because its node died, resumes OUT, which all nodes share, or its mirror, with
`--take-over`: what was taken for dead may be alive.
"""

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import ray
import structlog
from ray.exceptions import RayError

from streamsyn.errors import ConfigError
from streamsyn.fleet.launch import DIE_WITH_PARENT

log = structlog.get_logger()

STOPPED: Final = 75
"""The exit code of a run that stopped early."""
_BEGUN: Final = ("run.json", "partitions.json")
"""Files of OUT, one of which is there once a run has begun."""
_PASSED_ON: Final = "STREAMSYN_"
"""The beginning of the environment variables that a run gets from this process: the servers' keys."""
_CHUNK_BYTES: Final = 1 << 16
_WAITING_S = 30.0
"""Seconds without a place after which a log line says so."""


@dataclass(frozen=True, slots=True)
class RunCommand:
    """A run to be submitted.

    Attributes:
        arguments: Those of `streamsyn run`, with an absolute `--out`.
        out: The run directory.
        folder: Where relative paths of the arguments begin, on each node.
        environ: Variables of this process that the run needs, such as keys of servers.
        is_mirrored: Whether it goes on from its mirror on a node that does not have `out`.
    """

    arguments: tuple[str, ...]
    out: Path
    folder: Path
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    is_mirrored: bool = False

    def taking_over(self) -> "RunCommand":
        """The same, of a run that another process may still be writing."""
        return replace(self, arguments=(*self.arguments, "--take-over"))


class Coordinator:
    """The actor: one process of `streamsyn run`, which dies with it.

    Args:
        command: The run.
        is_begun: Whether its directory is there.
        servers: The first line on its stdin, which is a pipe then.
    """

    def __init__(self, command: RunCommand, *, is_begun: bool, servers: bytes = b"") -> None:
        self._command = command
        self._is_begun = is_begun
        self._servers = servers
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
        is_here = command.is_mirrored or any((command.out / name).exists() for name in _BEGUN)
        if self._is_begun and not is_here:
            raise ConfigError(
                f"{command.out} is not on {node}: it has to be on storage that all nodes share, or to have a "
                "mirror (sink.mirror)"
            )
        if not command.folder.is_dir():
            raise ConfigError(f"{command.folder} is not on {node}: submit from a folder that all nodes share")
        if not self._is_stopped:
            # In this thread: PR_SET_PDEATHSIG follows the thread that forks.
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid())),
                *(sys.executable, "-m", "streamsyn", "run", *command.arguments),
                stdin=PIPE if self._servers else DEVNULL,
                stdout=PIPE,
                stderr=STDOUT,
                cwd=command.folder,
                env={**os.environ, **command.environ},
                start_new_session=True,
            )
            assert self._process.stdout is not None, "a pipe"
            await self.tell(self._servers)
            while data := await self._process.stdout.read(_CHUNK_BYTES):
                yield data
        yield STOPPED if self._process is None else await self._process.wait()

    async def tell(self, servers: bytes) -> None:
        """Tell the run of its servers, with a line on its stdin."""
        self._servers = servers
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(servers)

    async def stop(self, number: int) -> None:
        """Pass a signal on to the run: the first one drains it."""
        self._is_stopped = True
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)


class PlacedRun:
    """A run on some node. Ray may place it only later.

    Args:
        command: The run.
        options: Those of its actor.
        is_begun: Whether its directory is there.
        servers: The servers to tell it of at first; empty if it has servers of its own.
        fields: Fields of its log lines.

    Attributes:
        code: The exit code, once it has ended.
    """

    def __init__(
        self,
        command: RunCommand,
        options: Mapping[str, Any],
        *,
        is_begun: bool,
        servers: bytes = b"",
        **fields: Any,
    ) -> None:
        self.code = -signal.SIGKILL.value
        self._fields = fields
        self._is_placed = False
        self._actor: Any = (
            ray.remote(Coordinator).options(**options).remote(command, is_begun=is_begun, servers=servers)
        )

    async def output(self) -> AsyncIterator[bytes]:
        """Yield what it prints, until it has ended.

        Raises:
            ConfigError: Its files are not on its node.
            RayError: The actor is gone.
        """
        answers = self._actor.run.options(num_returns="streaming").remote()
        waiting = asyncio.get_running_loop().call_later(_WAITING_S, self._tell_waiting)
        try:
            async for answer in answers:
                match await answer:
                    case bytes(data):
                        yield data
                    case str(node):
                        self._is_placed = True
                        waiting.cancel()
                        log.info("coordinator.placed", node=node, **self._fields)
                    case int(code):
                        self.code = code
        except RayError as error:
            if isinstance(cause := getattr(error, "cause", None), ConfigError):
                raise ConfigError(str(cause)) from None
            raise
        finally:
            waiting.cancel()

    def _tell_waiting(self) -> None:
        log.warning("coordinator.waiting", needs="a node with a free CPU", **self._fields)

    def tell(self, servers: bytes) -> None:
        """Tell it of its servers."""
        self._actor.tell.remote(servers)

    def stop(self, number: int) -> None:
        """Pass a signal on to it: the first one drains it."""
        if self._is_placed:
            self._actor.stop.remote(int(number))
        else:  # no node has room for it
            self.code = STOPPED
            self.kill()

    def kill(self) -> None:
        """End its actor, and with it the process."""
        ray.kill(self._actor)


def command_of(arguments: Sequence[str], out: Path, *, is_mirrored: bool = False) -> RunCommand:
    """Return the run of some arguments of `streamsyn run`; relative paths begin in this process's folder."""
    environ = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    return RunCommand(tuple(arguments), out, Path.cwd(), environ, is_mirrored)
