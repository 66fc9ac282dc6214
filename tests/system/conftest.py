"""The command line as a user has it: subprocesses, and simulated servers that are processes too."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.fork_server import ForkedProcess, ForkServer

COMMAND = [sys.executable, "-m", "streamsyn"]
STARTED: list[subprocess.Popen[bytes]] = []
FORKS = ForkServer("streamsyn.pipeline.run", "streamsyn.pipeline.verify", "streamsyn.simulator.app")


def streamsyn(
    *arguments: object,
    timeout_s: float = 100,
    input: str | None = None,  # noqa: A002 - as `subprocess.run` names it
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with `input` on its stdin; output as text."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with _process(*arguments, text=True, **options) as process:
        try:
            stdout, stderr = process.communicate(input, timeout_s)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """Start a command. What a test that failed has left running is ended behind it."""
    process = _process(*arguments, **{"stderr": subprocess.PIPE, **options})
    STARTED.append(process)
    return process


def _process(*arguments: object, **options: Any) -> subprocess.Popen[Any]:
    given = list(map(str, arguments))
    if given[:1] == ["run"] and "preflight" not in options:  # tests count requests
        given.insert(1, "--no-preflight")
    options.pop("preflight", None)
    if "preexec_fn" in options:
        # Only a process of its own can be given limits, and they would hit the file of a coverage run, too.
        unmeasured = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
        return subprocess.Popen([*COMMAND, *given], **{"env": unmeasured, **options})
    return ForkedProcess(FORKS, given, **options)


def wait_for_line(process: subprocess.Popen[bytes], pattern: str) -> str:
    """Read stderr up to a line that has `pattern`."""
    assert process.stderr is not None
    for line in process.stderr:
        if re.search(pattern, text := line.decode()):
            return text
    raise AssertionError(f"no line with {pattern!r} came")


class Server:
    """A simulated server."""

    def __init__(self, *options: str) -> None:
        self.process = start("simulate", "--port", "0", *options)
        found = re.search(r"http://[^ ]+", wait_for_line(self.process, "http://"))
        assert found is not None
        self.url = found.group()

    def stats(self) -> dict[str, Any]:
        """What it counts."""
        with urllib.request.urlopen(f"{self.url}/simulator/stats", timeout=10) as answer:
            counted: dict[str, Any] = json.load(answer)
        return counted

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it."""
        self.process.send_signal(number)
        self.process.wait(20)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture(autouse=True, scope="session")
def fork_server() -> Iterator[None]:
    """The process that tests fork their commands from ends with the session."""
    yield
    FORKS.close()


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    """One test that fails is not to fail others, by its load or by warnings of what it left open."""
    yield
    for process in STARTED:
        if process.poll() is None:
            kill = os.killpg if os.getpgid(process.pid) == process.pid else os.kill
            kill(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout, process.stderr)):
                pipe.close()
    STARTED.clear()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Starts simulated servers, which end with the test."""
    servers: list[Server] = []

    def started(*options: str) -> Server:
        servers.append(Server(*options))
        return servers[-1]

    yield started
    for server in servers:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture
def seeds(tmp_path: Path) -> Callable[..., Path]:
    """Writes files of seeds, all different."""

    def written(number: int, name: str = "riddles.jsonl") -> Path:
        path = tmp_path / name
        lines = (
            json.dumps(
                {"instruction": f"Who kept lighthouse {n} of {name}?", "answer": f"Keeper number {n * 7919}."}
            )
            for n in range(number)
        )
        path.write_text("\n".join(lines) + "\n")
        return path

    return written


def rows(out: Path, kind: str) -> list[dict[str, Any]]:
    """All rows of a kind, sealed and open ones, but for a torn end."""
    found = []
    for path in [*sorted((out / kind).glob("*.jsonl")), *sorted((out / kind).glob("*.open"))]:
        found += [
            json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")
        ]
    return found


def assert_clean(out: Path) -> None:
    """`verify` finds nothing."""
    verified = streamsyn("verify", out)

    assert (0, "") == (verified.returncode, verified.stderr), verified.stdout
    assert "problem:" not in verified.stdout


def environment(**more: str) -> dict[str, str]:
    """Ours, and more."""
    return {**os.environ, **more}
