"""A local SGLang server for the length of a run: started, watched, restarted when it dies, gone afterwards.

    async with launched("models/Qwen3-8B", log_path=out / "sglang.log") as server:
        ...  # server.url answers; it stays the same across restarts

The server runs in a session of its own: a Ctrl-C at our terminal does not reach it before we have drained,
and all that it starts can be ended together. Should we be killed outright, the kernel ends it.
"""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import structlog

from streamsyn.errors import LaunchError
from streamsyn.sglang import launch_log
from streamsyn.sglang.launch_command import (
    LaunchCommand,
    find_python,
    has_gpu,
    is_cpu_install,
    served_name,
    server_command,
)

PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 10.0  # /health generates a token: about a second on a quiet CPU, several on a busy one
STOP_TIMEOUT_S = 20.0

# As Ctrl-C would: 0.5 to 3 s to a clean end. SIGTERM takes 6 s when it goes to the group (the API server
# finds its scheduler dead, and waits to diagnose it) and 11 s when it goes to the API server alone.
STOP_SIGNAL = signal.SIGINT

# Runs in the child before the server: asks the kernel for SIGKILL when the thread that forked it ends, looks
# whether that has happened already, and becomes the server. (A shell's `&` may have had SIGINT ignored.)
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
signal.signal(signal.SIGINT, signal.SIG_DFL)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""

OnWait = Callable[[float, str], None]
"""Told about once a second for how long a server has been starting, and the last line of its log."""

log = structlog.get_logger(__name__)


class LaunchedServer:
    """A server's process and all that it starts; after a death the next process takes over its port."""

    def __init__(self, command: LaunchCommand, *, port: int, model: str, log_path: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.model = model
        """The name under which the server knows its model."""
        self.log_path = log_path
        self.starts = 0
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._log_offset = 0

    def __repr__(self) -> str:
        return f"<LaunchedServer {self.url} model={self.model} pid={self.pid} starts={self.starts}>"

    @property
    def pid(self) -> int | None:
        """The process at the head of the server's group; None when there is no server."""
        return self._process.pid if self._process else None

    async def start(self) -> asyncio.subprocess.Process:
        """Start the process. It writes to the log itself, so that nothing it says is lost if we are."""
        self.starts += 1
        title = f"start {self.starts}: {' '.join(self._command.argv)}"
        try:
            output, self._log_offset = await asyncio.to_thread(launch_log.begin, self.log_path, title)
            with output:
                # In this thread, never in a pool's: PR_SET_PDEATHSIG follows the thread that forks.
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid())),
                    *self._command.argv,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **self._command.environment},
                    start_new_session=True,
                )
        except OSError as error:
            raise LaunchError(f"SGLang cannot be started: {error}") from error
        self._process = process
        log.info("sglang.starting", url=self.url, pid=process.pid, log=str(self.log_path))
        return process

    async def wait_healthy(
        self, process: asyncio.subprocess.Process, timeout_s: float, on_wait: OnWait | None
    ) -> None:
        """Return when /health says 200; raise LaunchError when the process or the time ends before that."""
        started_at = time.monotonic()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)) as session:
            while not await self._is_healthy(session):
                waited_s = time.monotonic() - started_at
                if process.returncode is not None:
                    raise LaunchError(await self._why(f"SGLang {_ended(process)} while starting"))
                if waited_s > timeout_s:
                    raise LaunchError(await self._why(f"SGLang did not answer within {timeout_s:g} s"))
                if on_wait is not None:
                    on_wait(waited_s, await self._last_line())
                with suppress(TimeoutError):
                    async with asyncio.timeout(PROBE_INTERVAL_S):
                        await process.wait()
        log.info("sglang.ready", url=self.url, seconds=round(time.monotonic() - started_at, 1))

    async def supervise(self, process: asyncio.subprocess.Process, max_restarts: int) -> None:
        """Start it again when it dies, so many times; after that the fleet will find it gone."""
        for restart in range(1, max_restarts + 1):
            await process.wait()
            self._forget(process)
            log.warning("sglang.restarted", url=self.url, restart=restart, because=_ended(process))
            process = await self.start()
        await process.wait()
        self._forget(process)
        log.error("sglang.gave_up", url=self.url, because=_ended(process), log=str(self.log_path))

    async def stop(self) -> None:
        """End the process and all that it started: asked first, then made to."""
        process = self._process
        if process is None:
            return
        try:
            _signal_group(process, STOP_SIGNAL)
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await process.wait()
        finally:  # also when we are cancelled once more
            self._forget(process)
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
        log.info("sglang.stopped", url=self.url, because=_ended(process))

    def _forget(self, process: asyncio.subprocess.Process) -> None:
        """Kill what is left of a group, and never signal it again: its number may come to be another's."""
        _signal_group(process, signal.SIGKILL)
        self._process = None

    async def _is_healthy(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(f"{self.url}/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _last_line(self) -> str:
        return await asyncio.to_thread(launch_log.last_line, self.log_path, self._log_offset)

    async def _why(self, what: str) -> str:
        line = await asyncio.to_thread(launch_log.telling_line, self.log_path, self._log_offset)
        return f"{what}; its log is {self.log_path}" + (f" and says: {line}" if line else "")


@asynccontextmanager
async def launched(
    model: str | Path,
    *,
    python: Path | None = None,
    log_path: Path,
    extra_args: Sequence[str] = (),
    start_timeout_s: float = 900.0,
    on_wait: OnWait | None = None,
    max_restarts: int = 3,
) -> AsyncGenerator[LaunchedServer, None]:
    """A healthy SGLang server for `model` on a free port of this machine, watched while the body runs."""

    def prepared() -> LaunchedServer:
        port, interpreter = free_port(), find_python(python)
        gpu = has_gpu() and not is_cpu_install(interpreter)
        command = server_command(interpreter, model, port, gpu=gpu, extra_args=extra_args)
        return LaunchedServer(command, port=port, model=served_name(model), log_path=log_path)

    server = await asyncio.to_thread(prepared)
    async with supervised(
        server, start_timeout_s=start_timeout_s, on_wait=on_wait, max_restarts=max_restarts
    ):
        yield server


@asynccontextmanager
async def supervised(
    server: LaunchedServer, *, start_timeout_s: float, on_wait: OnWait | None = None, max_restarts: int
) -> AsyncGenerator[None, None]:
    """The life of a server: up, watched while the body runs, and gone whichever way the body ends."""
    body_error: Exception | None = None
    try:
        process = await server.start()
        await server.wait_healthy(process, start_timeout_s, on_wait)
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(server.supervise(process, max_restarts), name=f"supervise {server.url}")
            try:
                yield
            except Exception as error:  # noqa: BLE001  (raised below: as itself, not as a group of one)
                body_error = error
            watch.cancel()
    finally:
        await server.stop()
    if body_error is not None:
        raise body_error


def free_port() -> int:
    """A port of this machine that nobody listens on, for now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _signal_group(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # nobody is left of it
        os.killpg(process.pid, number)


def _ended(process: asyncio.subprocess.Process) -> str:
    """How a process ended, in words."""
    code = process.returncode
    if code is not None and code < 0:
        return f"was ended by signal {-code} ({signal.strsignal(-code)})"
    return f"exited with code {code}"
