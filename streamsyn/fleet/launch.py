"""How a local SGLang server is started: which interpreter, which flags, which environment.

The log of a launched server: written by the server itself, read here to say how its start goes.

A local SGLang server for the length of a run: started, watched, restarted when it dies, gone afterwards.

    async with launched("models/Qwen3-8B", log_path=out / "sglang.log") as server:
        ...  # server.url answers; it stays the same across restarts

The server runs in a session of its own: a Ctrl-C at our terminal does not reach it before we have drained,
and all that it starts can be ended together. Should we be killed outright, the kernel ends it.
"""

import asyncio
import importlib.util
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import aiohttp
import structlog

from streamsyn.errors import ConfigError, LaunchError

PYTHON_VARIABLE = "STREAMSYN_SGLANG_PYTHON"
HOME_VARIABLE = "STREAMSYN_SGLANG_HOME"
INSTALLER = "deploy/sglang-cpu/install.sh"
SOURCE_TREE = Path(__file__).parents[2]

CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "xgrammar", "--disable-overlap-schedule"),
    # 0.7 GB of KV cache for the packaged model, where a share of the memory would be 1.8 GB and 10 s.
    *("--mem-fraction-static", "0.1", "--max-total-tokens", "32768", "--max-running-requests", "32"),
    # Idle without spinning; /health generates a token anyway, so a warm-up would only delay it.
    *("--sleep-on-idle", "--skip-server-warmup"),
)


@dataclass(frozen=True, slots=True)
class LaunchCommand:
    """A program to run, and what its environment has beyond ours."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def has_gpu() -> bool:
    """Whether this machine has a GPU; asks the file system alone, which is quick and cannot hang."""
    devices = (Path("/dev/nvidia0"), Path("/dev/kfd"))
    return any(device.exists() for device in devices) or shutil.which("nvidia-smi") is not None


def is_cpu_install(python: Path) -> bool:
    """Whether this is the interpreter of `INSTALLER`, which cannot use a GPU even where there is one."""
    return any(python.parents[1].glob("lib/python*/site-packages/sglang_cpu_server.py"))


def served_name(model: str | Path) -> str:
    """The name to ask the server for: a directory's own (behind any link), or the name on the hub."""
    return Path(model).resolve().name if Path(model).is_dir() else str(model)


def server_command(
    python: Path, model: str | Path, port: int, *, gpu: bool, extra_args: Sequence[str] = ()
) -> LaunchCommand:
    """The command that serves `model` on 127.0.0.1; `extra_args` come last and so win over ours."""
    argv = (
        *(str(python), "-m", "sglang.launch_server" if gpu else "sglang_cpu_server"),
        *("--model-path", str(model), "--served-model-name", served_name(model)),
        *("--host", "127.0.0.1", "--port", str(port), "--enable-cache-report", "--enable-metrics"),
        *(() if gpu else CPU_FLAGS),
        *extra_args,
    )
    environment = {"PYTHONUNBUFFERED": "1"}
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if not gpu:
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        # With more, OpenMP's spin waits take a pass from 0.1 s to 4 s as soon as anything else wants a core.
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return LaunchCommand(argv, environment)


def find_python(explicit: Path | None = None) -> Path:
    """The interpreter that has SGLang: named by flag or variable, else ours, else the installed one."""
    named = os.environ.get(PYTHON_VARIABLE)
    if explicit is not None:
        return _existing(explicit, "--sglang-python")
    if named:
        return _existing(Path(named), PYTHON_VARIABLE)
    found = importlib.util.find_spec("sglang")
    if found is not None and found.has_location:  # a folder that is merely called sglang has none
        return Path(sys.executable)
    for home in _homes():
        if (home / "venv/bin/python").exists():
            return home / "venv/bin/python"
    raise ConfigError(
        f"no SGLang found: name its interpreter with --sglang-python or {PYTHON_VARIABLE}, "
        f"or run {INSTALLER} on a machine without a GPU"
    )


def find_packaged_model() -> Path:
    """The small model that `INSTALLER` puts beside its SGLang."""
    for home in _homes():
        if (home / "model/config.json").exists():
            return home / "model"
    raise ConfigError(f"the packaged model is not installed: run {INSTALLER}")


def _homes() -> list[Path]:
    """Where the installer may have put things; the variable, when set, is the only place."""
    if home := os.environ.get(HOME_VARIABLE):
        return [Path(home).absolute()]
    return [SOURCE_TREE / ".sglang-cpu", Path.cwd() / ".sglang-cpu"]


def _existing(python: Path, name: str) -> Path:
    """The path, absolute but not resolved: behind a venv's link stands the Python it was made from."""
    if not os.access(python, os.X_OK) or python.is_dir():
        raise ConfigError(f"{name}: {python} is not a program that can be run")
    return python.absolute()


TAIL_BYTES = 64 * 1024
LINE_CHARS = 300
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
AN_ERROR = re.compile(r"(Error|Exception)\b|\b(error|FATAL|No module named)\b")


def begin(path: Path, title: str) -> tuple[IO[bytes], int]:
    """The log, open for a server to append to, and the offset at which its own output begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("ab")
    log.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n".encode())
    log.flush()
    return log, log.tell()


def last_line(path: Path, start: int) -> str:
    """The last line that is not blank, of those written since `start`; empty when there is none."""
    return next(reversed(_lines(path, start)), "")


def telling_line(path: Path, start: int) -> str:
    """The last line that speaks of an error, which shutting down may have buried; else simply the last."""
    errors = [line for line in _lines(path, start) if AN_ERROR.search(line)]
    return errors[-1] if errors else last_line(path, start)


def _lines(path: Path, start: int) -> list[str]:
    with path.open("rb") as log:
        end = log.seek(0, 2)
        log.seek(max(start, end - TAIL_BYTES))
        text = COLOUR.sub("", log.read().decode(errors="replace"))
    return [line.strip()[:LINE_CHARS] for line in text.splitlines() if line.strip()]


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
            output, self._log_offset = await asyncio.to_thread(begin, self.log_path, title)
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
        return await asyncio.to_thread(last_line, self.log_path, self._log_offset)

    async def _why(self, what: str) -> str:
        line = await asyncio.to_thread(telling_line, self.log_path, self._log_offset)
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
