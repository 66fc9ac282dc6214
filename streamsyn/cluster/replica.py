"""A server on its node: the actor that Ray places, which starts the process, and ends with it.

The process dies with its actor, and the actor with its node's raylet: nothing is left behind on a node.
"""

import shutil
import tempfile
from asyncio.subprocess import Process
from dataclasses import dataclass
from pathlib import Path

import ray

from streamsyn.config.command_sections import ClusterSection
from streamsyn.errors import ConfigError, LaunchError
from streamsyn.fleet.launch import (
    LaunchCommand,
    LaunchedServer,
    find_python,
    free_port,
    has_gpu,
    is_cpu_install,
    served_name,
    server_command,
)


@dataclass(frozen=True, slots=True)
class Announcement:
    """A server that is ready.

    Attributes:
        url: Its base URL, as other nodes reach it.
        node: The address of its node.
    """

    url: str
    node: str


class Replica:
    """The part of a server that runs on one node: all of it, or one of `cluster.nodes_per_replica` ranks.

    Args:
        section: The `cluster` section of the configuration.
        name: Of the server; its log is called so.
        rank: Of this node among those of the server.
    """

    def __init__(self, section: ClusterSection, name: str, rank: int = 0) -> None:
        self._section = section
        self._name = name
        self._rank = rank
        self._host = ray.util.get_node_ip_address()
        self._server: LaunchedServer | None = None
        self._process: Process | None = None

    async def meeting_point(self) -> str:
        """Return an address on this node where the ranks of a server can meet."""
        return f"{self._host}:{free_port(self._host)}"

    async def start(self, head: str = "") -> Announcement:
        """Start the process; on rank 0, wait until it has generated a token.

        Args:
            head: Where the ranks of the server meet.

        Raises:
            LaunchError: It did not start within `cluster.start_timeout_s`; the message has the last error
                of its log.
        """
        port = free_port(self._host)
        try:
            command = self._command(port, head)
        except ConfigError as error:
            raise LaunchError(f"{self._host}: {error}") from error
        self._server = LaunchedServer(
            command,
            port=port,
            model=served_name(self._model),
            log_path=self._log_path(),
            host=self._host,
        )
        self._process = await self._server.start()
        if self._rank == 0:
            try:
                await self._server.wait_healthy(self._process, self._section.start_timeout_s, None)
            except LaunchError as error:
                await self.stop()
                raise LaunchError(f"{self._host}: {error}") from None
        return Announcement(self._server.url, self._host)

    async def ended(self) -> str:
        """Wait until the process has ended; return how."""
        assert self._process is not None, "start comes first"
        code = await self._process.wait()
        return f"exited with code {code}" if code >= 0 else f"was killed by signal {-code}"

    async def stop(self) -> None:
        """Stop the process, if it runs."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop()

    @property
    def _model(self) -> str:
        assert self._section.model is not None, "checked before anything is placed"
        return self._section.model

    def _log_path(self) -> Path:
        folder = self._section.log_dir or Path(tempfile.gettempdir()) / "streamsyn-servers"
        return folder / f"{self._name}-{self._rank}.log"

    def _command(self, port: int, head: str) -> LaunchCommand:
        """Return the command of this rank.

        Raises:
            ConfigError: SGLang, or the program of `cluster.command`, is not on this node.
        """
        section = self._section
        if section.command:
            values = {
                "model": self._model,
                "host": self._host,
                "port": str(port),
                "rank": str(self._rank),
                "nodes": str(section.nodes_per_replica),
                "head": head,
            }
            argv = [_filled(word, values) for word in section.command]
            if shutil.which(argv[0]) is None:
                raise ConfigError(f"cluster.command: {argv[0]} is not a program of this node")
            return LaunchCommand((*argv, *section.args))
        python = find_python(section.python)
        ranks: tuple[str, ...] = ()
        if section.nodes_per_replica > 1:
            ranks = (
                *("--nnodes", str(section.nodes_per_replica), "--node-rank", str(self._rank)),
                *("--dist-init-addr", head),
            )
        return server_command(
            python,
            self._model,
            port,
            gpu=has_gpu() and not is_cpu_install(python),
            extra_args=(*ranks, *section.args),
            host=self._host,
        )


def _filled(word: str, values: dict[str, str]) -> str:
    """Replace `{name}` in a word of `cluster.command`; other braces stay."""
    for name, value in values.items():
        word = word.replace(f"{{{name}}}", value)
    return word
