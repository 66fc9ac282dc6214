"""Launch a local SGLang server for the length of a run: start it, restart it when it dies, stop it.

    async with launched("models/Qwen3-8B", log_path=out / "sglang.log") as server:
        ...  # server.url answers; it stays the same across restarts

The server runs in a session of its own. So Ctrl-C at our terminal does not reach it before the run has
drained, and all its processes can be stopped together. If our process is killed, the kernel kills the server.
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

log = structlog.get_logger(__name__)

PYTHON_VARIABLE = "STREAMSYN_SGLANG_PYTHON"
HOME_VARIABLE = "STREAMSYN_SGLANG_HOME"
INSTALLER = "deploy/sglang-cpu/install.sh"
SOURCE_TREE = Path(__file__).parents[2]

CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "xgrammar", "--disable-overlap-schedule"),
    # 0.7 GB of KV cache for the packaged model; a share alone would take several, and 10 s. What other
    # processes take while it loads, the server counts as weights: the share leaves room for them.
    *("--mem-fraction-static", "0.5", "--max-total-tokens", "32768", "--max-running-requests", "32"),
    # Idle without spinning; /health generates a token anyway, so a warm-up would only delay it.
    *("--sleep-on-idle", "--skip-server-warmup"),
)

PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 10.0  # /health generates a token: about a second on a quiet CPU, several on a busy one
STOP_TIMEOUT_S = 20.0

# As Ctrl-C does: a clean end within 0.5 to 3 s. SIGTERM takes 6 s when sent to the group (the API server
# finds its scheduler dead and waits to diagnose it), and 11 s when sent to the API server alone.
STOP_SIGNAL = signal.SIGINT

# Runs in the child before the server: requests SIGKILL from the kernel when the thread that forked it ends,
# checks that this has not happened already, and becomes the server. (A shell's `&` may have ignored SIGINT,
# and the thread of an actor blocks signals.)
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""

OnWait = Callable[[float, str], None]
"""Called about once a second with the seconds since the start, and the last line of the server's log."""

TAIL_BYTES = 64 * 1024
LINE_CHARS = 300
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
ERROR_LINE = re.compile(r"(Error|Exception)\b|\b(error|FATAL|No module named)\b")


@dataclass(frozen=True, slots=True)
class LaunchCommand:
    """A program with its arguments, and environment variables to add to ours."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


class LaunchedServer:
    """A server's process group; after a restart the new process has the same port."""

    def __init__(
        self, command: LaunchCommand, *, port: int, model: str, log_path: Path, host: str = "127.0.0.1"
    ) -> None:
        self.url = f"http://{host}:{port}"
        self.model = model
        """The served model name."""
        self.log_path = log_path
        self.starts = 0
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._log_offset = 0

    def __repr__(self) -> str:
        return f"<LaunchedServer {self.url} model={self.model} pid={self.pid} starts={self.starts}>"

    @property
    def pid(self) -> int | None:
        """The leader of the server's process group; None when it is not running."""
        return self._process.pid if self._process else None

    async def start(self) -> asyncio.subprocess.Process:
        """Start the process. It writes its log itself, so that no output is lost if our process dies."""
        self.starts += 1
        title = f"start {self.starts}: {' '.join(self._command.argv)}"
        try:
            output, self._log_offset = await asyncio.to_thread(open_log, self.log_path, title)
            with output:
                # In this thread, not in a pool thread: PR_SET_PDEATHSIG follows the thread that forks.
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
            raise LaunchError(f"cannot start SGLang: {error}") from error
        self._process = process
        log.info("sglang.starting", url=self.url, pid=process.pid, log=str(self.log_path))
        return process

    async def wait_healthy(
        self, process: asyncio.subprocess.Process, timeout_s: float, on_wait: OnWait | None
    ) -> None:
        """Wait until /health answers 200.

        Raises:
            LaunchError: The process ended, or `timeout_s` passed, before that.
        """
        started_at = time.monotonic()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)) as session:
            while not await self._is_healthy(session):
                waited_s = time.monotonic() - started_at
                if process.returncode is not None:
                    raise LaunchError(await self._with_log(f"SGLang {_exit_text(process)} while starting"))
                if waited_s > timeout_s:
                    raise LaunchError(await self._with_log(f"SGLang did not answer within {timeout_s:g} s"))
                if on_wait is not None:
                    on_wait(waited_s, await self._last_line())
                with suppress(TimeoutError):
                    async with asyncio.timeout(PROBE_INTERVAL_S):
                        await process.wait()
        log.info("sglang.ready", url=self.url, seconds=round(time.monotonic() - started_at, 1))

    async def supervise(self, process: asyncio.subprocess.Process, max_restarts: int) -> None:
        """Restart the process when it dies, `max_restarts` times; after that the fleet ejects the server."""
        for restart in range(1, max_restarts + 1):
            await process.wait()
            self._kill_group(process)
            log.warning("sglang.restarted", url=self.url, restart=restart, because=_exit_text(process))
            process = await self.start()
        await process.wait()
        self._kill_group(process)
        log.error("sglang.gave_up", url=self.url, because=_exit_text(process), log=str(self.log_path))

    async def stop(self) -> None:
        """Stop the process group: with a signal first, by force after `STOP_TIMEOUT_S`."""
        process = self._process
        if process is None:
            return
        try:
            _signal_group(process, STOP_SIGNAL)
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await process.wait()
        finally:  # also when cancelled again
            self._kill_group(process)
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
        log.info("sglang.stopped", url=self.url, because=_exit_text(process))

    def _kill_group(self, process: asyncio.subprocess.Process) -> None:
        """Kill what is left of the group, and never signal it again, since its id may be reused."""
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

    async def _with_log(self, what: str) -> str:
        """Return `what` with the path and the most useful line of the log."""
        line = await asyncio.to_thread(error_line, self.log_path, self._log_offset)
        return f"{what}; see {self.log_path}" + (f": {line}" if line else "")


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
    """Launch an SGLang server for `model` on a free port; it is healthy when the body begins.

    Args:
        model: A directory, or a name on the hub.
        python: Interpreter that has SGLang; None looks for one.
        log_path: The server's output.
        extra_args: Arguments for SGLang, which override ours.
        start_timeout_s: Longest start.
        on_wait: Called while it starts.
        max_restarts: Restarts after it has died.

    Raises:
        ConfigError: No SGLang was found.
        LaunchError: The server did not start.
    """

    def prepare() -> LaunchedServer:
        port, interpreter = free_port(), find_python(python)
        gpu = has_gpu() and not is_cpu_install(interpreter)
        command = server_command(interpreter, model, port, gpu=gpu, extra_args=extra_args)
        return LaunchedServer(command, port=port, model=served_name(model), log_path=log_path)

    server = await asyncio.to_thread(prepare)
    async with supervised(
        server, start_timeout_s=start_timeout_s, on_wait=on_wait, max_restarts=max_restarts
    ):
        yield server


@asynccontextmanager
async def supervised(
    server: LaunchedServer, *, start_timeout_s: float, on_wait: OnWait | None = None, max_restarts: int
) -> AsyncGenerator[None, None]:
    """Start `server`, restart it when it dies while the body runs, and stop it at the end."""
    body_error: Exception | None = None
    try:
        process = await server.start()
        await server.wait_healthy(process, start_timeout_s, on_wait)
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(server.supervise(process, max_restarts), name=f"supervise {server.url}")
            try:
                yield
            except Exception as error:  # noqa: BLE001  (raised below, not as a group of one)
                body_error = error
            watch.cancel()
    finally:
        await server.stop()
    if body_error is not None:
        raise body_error


def has_gpu() -> bool:
    """Whether this machine has a GPU, judged by device files: a quick check that cannot hang."""
    devices = (Path("/dev/nvidia0"), Path("/dev/kfd"))
    return any(device.exists() for device in devices) or shutil.which("nvidia-smi") is not None


def is_cpu_install(python: Path) -> bool:
    """Whether `python` was installed by `INSTALLER`; that SGLang cannot use a GPU."""
    return any(python.parents[1].glob("lib/python*/site-packages/sglang_cpu_server.py"))


def served_name(model: str | Path) -> str:
    """Return the served model name: the directory's name (links resolved), or the name on the hub."""
    return Path(model).resolve().name if Path(model).is_dir() else str(model)


def server_command(
    python: Path,
    model: str | Path,
    port: int,
    *,
    gpu: bool,
    extra_args: Sequence[str] = (),
    host: str = "127.0.0.1",
) -> LaunchCommand:
    """Return the command that serves `model`; `extra_args` come last and override ours."""
    argv = (
        *(str(python), "-m", "sglang.launch_server" if gpu else "sglang_cpu_server"),
        *("--model-path", str(model), "--served-model-name", served_name(model)),
        *("--host", host, "--port", str(port), "--enable-cache-report", "--enable-metrics"),
        *(() if gpu else CPU_FLAGS),
        *extra_args,
    )
    environment = {"PYTHONUNBUFFERED": "1"}
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if not gpu:
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        # With more threads, OpenMP's spin waits slow a pass from 0.1 s to 4 s if cores are shared.
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return LaunchCommand(argv, environment)


def find_python(explicit: Path | None = None) -> Path:
    """Return the interpreter that has SGLang: of the flag, the variable, our environment or the installer.

    Raises:
        ConfigError: None of them has it.
    """
    named = os.environ.get(PYTHON_VARIABLE)
    if explicit is not None:
        return _executable(explicit, "--sglang-python")
    if named:
        return _executable(Path(named), PYTHON_VARIABLE)
    found = importlib.util.find_spec("sglang")
    if found is not None and found.has_location:  # a mere folder called sglang has none
        return Path(sys.executable)
    for home in _homes():
        if (home / "venv/bin/python").exists():
            return home / "venv/bin/python"
    raise ConfigError(
        f"SGLang not found: pass its interpreter with --sglang-python or {PYTHON_VARIABLE}, "
        f"or run {INSTALLER} on a machine without a GPU"
    )


def find_packaged_model() -> Path:
    """Return the directory of the small model that `INSTALLER` installs.

    Raises:
        ConfigError: It is not installed.
    """
    for home in _homes():
        if (home / "model/config.json").exists():
            return home / "model"
    raise ConfigError(f"the packaged model is not installed: run {INSTALLER}")


def _homes() -> list[Path]:
    """Return the installer's possible target folders; the variable, when set, names the only one."""
    if home := os.environ.get(HOME_VARIABLE):
        return [Path(home).absolute()]
    return [SOURCE_TREE / ".sglang-cpu", Path.cwd() / ".sglang-cpu"]


def _executable(python: Path, name: str) -> Path:
    """Return the absolute path, links not resolved: a venv's link leads to the Python it was made from."""
    if not os.access(python, os.X_OK) or python.is_dir():
        raise ConfigError(f"{name}: {python} is not an executable file")
    return python.absolute()


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that is free now at an address of this machine."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def open_log(path: Path, title: str) -> tuple[IO[bytes], int]:
    """Open the server's log for appending. Return it and the offset at which the new output begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    file.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n".encode())
    file.flush()
    return file, file.tell()


def last_line(path: Path, start: int) -> str:
    """Return the last line that is not blank after the offset `start`; empty when there is none."""
    return next(reversed(_lines(path, start)), "")


def error_line(path: Path, start: int) -> str:
    """Return the last line with an error, which output of the shutdown may follow; else the last line."""
    errors = [line for line in _lines(path, start) if ERROR_LINE.search(line)]
    return errors[-1] if errors else last_line(path, start)


def _lines(path: Path, start: int) -> list[str]:
    with path.open("rb") as file:
        end = file.seek(0, 2)
        file.seek(max(start, end - TAIL_BYTES))
        text = COLOUR.sub("", file.read().decode(errors="replace"))
    return [line.strip()[:LINE_CHARS] for line in text.splitlines() if line.strip()]


def _signal_group(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # the group has ended
        os.killpg(process.pid, number)


def _exit_text(process: asyncio.subprocess.Process) -> str:
    code = process.returncode
    if code is not None and code < 0:
        return f"was killed by signal {-code} ({signal.strsignal(-code)})"
    return f"exited with code {code}"
