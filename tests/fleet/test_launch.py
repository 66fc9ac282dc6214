"""Launching a server: the command, its life beside ours, and its end, which leaves nothing behind.

Most tests run a small real server (`SERVER`) in place of SGLang. Its processes share one connection to the
test, which so learns of every start and, by the connection's end, that no process of that start is left.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog

from streamsyn.errors import ConfigError, LaunchError
from streamsyn.fleet import launch
from streamsyn.fleet.launch import (
    LaunchCommand,
    LaunchedServer,
    find_packaged_model,
    find_python,
    free_port,
    server_command,
    supervised,
)

SERVER = '''
"""SERVER MODE PORT NEWS_PORT: answers /health, exits on a POST, has one child that only SIGKILL ends."""
import http.server, os, signal, socket, subprocess, sys

mode, port, news_port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if mode in ("child", "stubborn"):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "child":
    print("ready", flush=True)
    signal.pause()
if mode == "broken":
    print("ValueError: no such model")
    print("shutting down")
    sys.exit(7)

news = socket.create_connection(("127.0.0.1", news_port))
if mode != "alone":
    command = [sys.executable, __file__, "child", "0", "0"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[news.fileno()])
    child.stdout.readline()
if mode == "slow":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    print("\\033[1mloading weights\\033[0m", flush=True)
    signal.sigwaitinfo([signal.SIGUSR1])

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        os._exit(3)

server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
news.sendall(b"listening\\n")
server.serve_forever()
'''


@dataclass
class News:
    """What the processes under test tell of themselves."""

    port: int = 0
    starts: asyncio.Queue[asyncio.StreamReader] = field(default_factory=asyncio.Queue)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        self.starts.put_nowait(reader)

    async def next_connection(self) -> asyncio.StreamReader:
        """The connection of the next server, which may not listen yet."""
        async with asyncio.timeout(20):
            return await self.starts.get()

    async def next_start(self) -> asyncio.StreamReader:
        """The connection of the next server, which listens."""
        start = await self.next_connection()
        async with asyncio.timeout(20):
            assert await start.readline() == b"listening\n"
        return start


async def all_gone(start: asyncio.StreamReader) -> bool:
    """True once no process that belongs to this start is left."""
    async with asyncio.timeout(20):
        return await start.read() == b""


async def die(server: LaunchedServer) -> None:
    """Make the process that answers at this URL exit."""
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await session.post(server.url)  # a GET would be tried again, and end the next one too


@pytest.fixture
async def news() -> AsyncIterator[News]:
    news = News()
    listener = await asyncio.start_server(news.connected, "127.0.0.1")
    news.port = listener.sockets[0].getsockname()[1]
    yield news
    for writer in news.writers:
        writer.close()
    listener.close()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    return script


@pytest.fixture
def server(
    script: Path, news: News, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], LaunchedServer]:
    """Makes a server, not yet started, that behaves as its mode says; it starts faster than SGLang."""
    monkeypatch.setattr(launch, "PROBE_INTERVAL_S", 0.05)

    def make(mode: str) -> LaunchedServer:
        port = free_port()
        command = LaunchCommand((sys.executable, str(script), mode, str(port), str(news.port)))
        return LaunchedServer(command, port=port, model="m", log_path=tmp_path / "logs/sglang.log")

    return make


@pytest.fixture
def events() -> Iterator[asyncio.Queue[dict[str, Any]]]:
    """Every event that is logged, in order."""
    queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def keep(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
        queue.put_nowait(dict(event))
        raise structlog.DropEvent

    structlog.configure(processors=[keep])
    yield queue
    structlog.reset_defaults()


async def logged(events: asyncio.Queue[dict[str, Any]], name: str) -> dict[str, Any]:
    """The next event of this name; those before it are passed over."""
    async with asyncio.timeout(20):
        while (event := await events.get())["event"] != name:
            pass
    return event


def watched(server: LaunchedServer, max_restarts: int = 3) -> AbstractAsyncContextManager[None]:
    return supervised(server, start_timeout_s=30, max_restarts=max_restarts)


# The command.


def test_on_a_gpu_machine_sglang_runs_with_nothing_but_what_streamsyn_needs() -> None:
    """Performance flags are left to the user."""
    command = server_command(Path("/venv/bin/python"), "org/Model-8B", 31000, gpu=True)

    assert " ".join(command.argv) == (
        "/venv/bin/python -m sglang.launch_server --model-path org/Model-8B --served-model-name org/Model-8B "
        "--host 127.0.0.1 --port 31000 --enable-cache-report --enable-metrics"
    )
    assert command.environment == {"PYTHONUNBUFFERED": "1"}


def test_on_a_cpu_machine_the_installed_launcher_runs_with_the_cpu_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory needs no hub; one OpenMP thread unless the user says otherwise."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    command = server_command(Path("python"), tmp_path, 31000, gpu=False)

    assert command.argv[:3] == ("python", "-m", "sglang_cpu_server")
    assert set(launch.CPU_FLAGS) < set(command.argv)
    assert command.environment == {
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def test_the_users_own_number_of_threads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """OMP_NUM_THREADS in the environment wins."""
    monkeypatch.setenv("OMP_NUM_THREADS", "8")

    assert server_command(Path("python"), "m", 1, gpu=False).environment["OMP_NUM_THREADS"] == "8"


def test_the_users_flags_come_last() -> None:
    """SGLang uses the last value of a repeated flag."""
    command = server_command(Path("python"), "m", 1, gpu=False, extra_args=["--max-total-tokens", "1000"])

    assert command.argv[-2:] == ("--max-total-tokens", "1000")


def test_a_directory_is_served_under_its_own_name_whatever_link_led_to_it(tmp_path: Path) -> None:
    """`model` is only where the installer put it."""
    (tmp_path / "SmolLM2").mkdir()
    (tmp_path / "model").symlink_to("SmolLM2")

    assert launch.served_name(tmp_path / "model") == "SmolLM2"


# The interpreter and the model.


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where an installed SGLang may be; empty."""
    monkeypatch.delenv("STREAMSYN_SGLANG_PYTHON", raising=False)
    monkeypatch.setenv("STREAMSYN_SGLANG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def python_at(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.symlink_to(sys.executable)
    return path


def test_flag_variable_and_installed_venv_are_asked_in_this_order(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A venv's link is kept: what it points to is another environment."""
    installed = python_at(home / "venv/bin/python")
    by_variable = python_at(tmp_path / "variable/python")
    by_flag = python_at(tmp_path / "flag/python")

    assert find_python() == installed
    monkeypatch.setenv("STREAMSYN_SGLANG_PYTHON", str(by_variable))
    assert find_python() == by_variable
    assert find_python(by_flag) == by_flag


def test_our_own_interpreter_is_used_when_sglang_is_installed_in_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked up, not imported, which would take ten seconds."""
    (tmp_path / "site/sglang").mkdir(parents=True)
    (tmp_path / "site/sglang/__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")

    assert find_python() == Path(sys.executable)


def test_a_folder_that_is_called_sglang_is_not_sglang(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python would import it as a namespace package."""
    (tmp_path / "site/sglang").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "site")

    with pytest.raises(ConfigError, match="SGLang not found"):
        find_python()


def test_the_installed_sglang_is_known_by_its_launcher(home: Path) -> None:
    """It is started as on a CPU machine, even with a GPU."""
    installed = python_at(home / "venv/bin/python")
    assert not launch.is_cpu_install(installed)

    (home / "venv/lib/python3.11/site-packages").mkdir(parents=True)
    (home / "venv/lib/python3.11/site-packages/sglang_cpu_server.py").touch()

    assert launch.is_cpu_install(installed)


def test_without_any_sglang_the_error_says_what_to_do(home: Path) -> None:
    """The message names the flag, the variable and the installer."""
    with pytest.raises(ConfigError) as caught:
        find_python()

    for way in ("--sglang-python", "STREAMSYN_SGLANG_PYTHON", "deploy/sglang-cpu/install.sh"):
        assert way in str(caught.value)


def test_a_named_interpreter_that_does_not_exist_is_refused_by_its_name(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the user named is used or refused, never replaced."""
    with pytest.raises(ConfigError, match=r"--sglang-python: .*/absent"):
        find_python(tmp_path / "absent")
    monkeypatch.setenv("STREAMSYN_SGLANG_PYTHON", str(tmp_path))
    with pytest.raises(ConfigError, match="STREAMSYN_SGLANG_PYTHON: "):
        find_python()


def test_the_packaged_model_is_found_where_it_was_installed(home: Path) -> None:
    """If it is missing, the error names the installer."""
    with pytest.raises(ConfigError, match=r"deploy/sglang-cpu/install\.sh"):
        find_packaged_model()

    (home / "model").mkdir(parents=True)
    (home / "model/config.json").write_text("{}")

    assert find_packaged_model() == home / "model"


# Starting.


async def test_a_server_that_ends_while_starting_is_reported_with_its_log(
    server: Callable[[str], LaunchedServer],
) -> None:
    """The line that tells why stands in the error, not the one that came last."""
    broken = server("broken")

    with pytest.raises(LaunchError) as caught:
        async with watched(broken):
            pytest.fail("it never was healthy")

    assert str(caught.value) == (
        f"SGLang exited with code 7 while starting; see {broken.log_path}: ValueError: no such model"
    )


async def test_a_program_that_cannot_be_run_is_reported_in_the_same_way(tmp_path: Path) -> None:
    """The wrapper's error is in the log."""
    absent = LaunchedServer(LaunchCommand(("/absent",)), port=1, model="m", log_path=tmp_path / "log")

    with pytest.raises(LaunchError, match="FileNotFoundError"):
        async with watched(absent):
            pytest.fail("it never was healthy")


async def test_a_log_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    """The message is one line that names the file."""
    (tmp_path / "file").touch()
    server = LaunchedServer(LaunchCommand(("/absent",)), port=1, model="m", log_path=tmp_path / "file/log")

    with pytest.raises(LaunchError, match=r"cannot start SGLang: .*/file"):
        async with watched(server):
            pytest.fail("it never was healthy")


async def test_a_server_that_does_not_answer_in_time_is_ended(
    server: Callable[[str], LaunchedServer], news: News
) -> None:
    """The start is given up, and stopping ends what there is of it."""
    slow = server("slow")
    process = await slow.start()
    start = await news.next_connection()

    with pytest.raises(LaunchError, match=r"did not answer within 0\.1 s"):
        await slow.wait_healthy(process, 0.1, None)
    await slow.stop()

    assert await all_gone(start)


async def test_while_a_server_starts_its_last_line_is_told(
    server: Callable[[str], LaunchedServer], news: News
) -> None:
    """At every probe, with the time so far. This server goes on only once its line was seen."""
    slow = server("slow")
    told: list[tuple[float, str]] = []

    def on_wait(seconds: float, line: str) -> None:
        told.append((seconds, line))
        if line == "loading weights" and slow.pid is not None:
            os.kill(slow.pid, signal.SIGUSR1)

    async with supervised(slow, start_timeout_s=30, on_wait=on_wait, max_restarts=3):
        await news.next_start()

    assert told[0][1] == ""
    assert told[-1][1] == "loading weights"
    assert told == sorted(told)


# Dying and being restarted.


async def test_a_server_that_dies_is_restarted_at_the_same_url(
    server: Callable[[str], LaunchedServer], news: News, events: asyncio.Queue[dict[str, Any]]
) -> None:
    """What the dead one had started is gone by then; the log has a title line for each start."""
    fragile = server("normal")

    async with watched(fragile):
        first = await news.next_start()
        await die(fragile)
        warning = await logged(events, "sglang.restarted")
        second = await news.next_start()
        assert await all_gone(first)
        async with aiohttp.ClientSession() as session, session.get(f"{fragile.url}/health") as response:
            assert response.status == 200

    assert await all_gone(second)
    assert warning == {
        "event": "sglang.restarted",
        "url": fragile.url,
        "restart": 1,
        "because": "exited with code 3",
    }
    assert [line[-2:] for line in titles(fragile.log_path)] == ["1:", "2:"]


def titles(log_path: Path) -> list[str]:
    lines = log_path.read_text().splitlines()
    return [line.partition(f" {sys.executable}")[0] for line in lines if line.startswith("=== ")]


async def test_when_the_restarts_are_used_up_the_server_stays_gone(
    server: Callable[[str], LaunchedServer], news: News, events: asyncio.Queue[dict[str, Any]]
) -> None:
    """The body goes on: ending the run is up to the fleet."""
    fragile = server("normal")

    async with watched(fragile, max_restarts=1):
        first = await news.next_start()
        await die(fragile)
        second = await news.next_start()
        await die(fragile)
        error = await logged(events, "sglang.gave_up")
        assert await all_gone(first)
        assert await all_gone(second)

    assert error["because"] == "exited with code 3"
    assert fragile.starts == 2
    assert fragile.pid is None


# The end.


async def test_at_the_end_the_server_and_what_it_started_are_gone(
    server: Callable[[str], LaunchedServer], news: News
) -> None:
    """Its child ignores every signal that can be ignored."""
    async with watched(server("normal")):
        start = await news.next_start()

    assert await all_gone(start)


async def test_a_server_that_will_not_stop_is_killed(
    server: Callable[[str], LaunchedServer], news: News, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a bounded wait."""
    monkeypatch.setattr(launch, "STOP_TIMEOUT_S", 0.5)

    async with watched(server("stubborn")):
        start = await news.next_start()

    assert await all_gone(start)


async def test_an_error_of_the_body_comes_out_as_itself(
    server: Callable[[str], LaunchedServer], news: News
) -> None:
    """Not as a group of one; and the server is gone."""

    async def run() -> None:
        async with watched(server("normal")):
            raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        await run()

    assert await all_gone(await news.next_start())


async def test_cancelling_the_body_ends_the_server(
    server: Callable[[str], LaunchedServer], news: News
) -> None:
    """And stays a cancellation."""

    async def run() -> None:
        async with watched(server("normal")):
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as group:
        running = group.create_task(run())
        start = await news.next_start()
        running.cancel()

    assert running.cancelled()
    assert await all_gone(start)


async def test_cancelling_the_start_ends_the_server(
    server: Callable[[str], LaunchedServer], news: News
) -> None:
    """It has not answered yet, but has a child already."""

    async def run() -> None:
        async with watched(server("slow")):
            pytest.fail("it never was healthy")

    async with asyncio.TaskGroup() as group:
        running = group.create_task(run())
        start = await news.next_connection()
        running.cancel()

    assert await all_gone(start)


OWNER = """
import asyncio, sys
from pathlib import Path
from streamsyn.fleet.launch import LaunchedServer, supervised
from streamsyn.fleet.launch import LaunchCommand

async def main():
    *argv, port = sys.argv[2:]
    server = LaunchedServer(LaunchCommand((*argv, port)), port=1, model="m", log_path=Path(sys.argv[1]))
    async with supervised(server, start_timeout_s=60, max_restarts=3):
        pass

asyncio.run(main())
"""


async def test_when_we_are_killed_the_server_dies_too(script: Path, news: News, tmp_path: Path) -> None:
    """After SIGKILL the kernel ends the server."""
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OWNER, str(tmp_path / "log")),
        *(sys.executable, str(script), "alone", str(free_port()), str(news.port)),
    )
    start = await news.next_start()

    owner.kill()

    assert await owner.wait() == -signal.SIGKILL
    assert await all_gone(start)
