"""A peer, its environment, and what one run of it costs."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import orjson
import psutil

HERE = Path(__file__).parent
SAMPLED_EVERY_S = 0.2
GIVE_UP_S = 180.0


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer and its driver.

    Attributes:
        environment: A folder of `.peers/` with a virtual environment; None is this one.
        variables: Environment variables for its driver.
        keeps: Whether it writes rows; the bare loop drops them.
        one_at_a_time: Whether it sends one request at a time, so that ten times the rows would take too long.
    """

    name: str
    driver: str
    environment: str | None = None
    variables: dict[str, str] = field(default_factory=dict)
    keeps: bool = True
    one_at_a_time: bool = False

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return Path(sys.executable) if self.environment is None else home() / self.environment / "bin/python"


PEERS = [
    Peer("bare aiohttp", "bare_aiohttp", keeps=False),
    Peer("streamsyn", "streamsyn_rows"),
    Peer("plain script", "plain", one_at_a_time=True),
    Peer("datatrove", "datatrove_rows", "datatrove"),
    Peer("datatrove, checkpoints", "datatrove_rows", "datatrove", {"CHECKPOINTS": "1"}),
    Peer("NeMo Data Designer", "data_designer_rows", "data-designer"),
    Peer("bespokelabs-curator", "curator_rows", "bespokelabs-curator"),
    Peer("distilabel", "distilabel_rows", "distilabel"),
    Peer("ray.data.llm", "ray_rows", "ray"),
]


def home() -> Path:
    """Where the environments are: `$STREAMSYN_PEERS_HOME`, or `.peers/` at the root of the repository."""
    return Path(os.environ.get("STREAMSYN_PEERS_HOME") or HERE.parents[1] / ".peers")


def environment(name: str) -> Path:
    """Return the folder of an environment, which is installed if it is not there."""
    folder = home() / name
    if (folder / "done").exists():
        return folder
    print(f"installing {name} into {folder}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    listed = HERE / "requirements" / f"{name}.txt"
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "-q", "--no-cache-dir", "-r", str(listed)]
    subprocess.run(pip, check=True)
    (folder / "done").touch()
    return folder


class Server:
    """The simulated server of a measurement; see `benchmarks/peers/server.py`."""

    def __init__(self, *options: str) -> None:
        self._options = options

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "benchmarks.peers.server", *self._options]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        self.url = self._process.stderr.readline().split()[-1]
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def asked(self, answered: int = 0) -> dict[str, Any]:
        """Wait until at least `answered` requests have been answered; return what arrived since the reset."""
        with urllib.request.urlopen(f"{self.url}/asked?answered={answered}", timeout=GIVE_UP_S) as answer:
            found: dict[str, Any] = orjson.loads(answer.read())
        return found

    def reset(self) -> None:
        """Begin a new record."""
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/reset", method="POST")).close()


@dataclass(frozen=True, slots=True)
class Ended:
    """A run that has ended, and what it used, its child processes included.

    Attributes:
        exit_code: Negative after a signal.
        first_s: From its start to its first request; None without one.
        arrived: Requests at the server for each number of a seed.
        answered: Answers of the server for each number.
    """

    exit_code: int
    wall_s: float
    cpu_s: float
    peak_mib: float
    first_s: float | None
    arrived: Counter[str] = field(repr=False)
    answered: Counter[str] = field(repr=False)


class Run:
    """Runs a driver over a file of prompts, into a folder.

    Args:
        peer: Whose driver.
        server: Where it sends its requests.
        prompts: Its prompts.
        out: Where it writes.
        concurrency: Requests at a time.
    """

    def __init__(self, peer: Peer, server: Server, prompts: Path, out: Path, concurrency: int) -> None:
        self._peer = peer
        self._server = server
        self._out = out
        self._command = [str(peer.python), str(HERE / "drivers" / f"{peer.driver}.py"), server.url]
        self._command += [str(prompts), str(out), str(concurrency)]
        self._log = out / "log.txt"

    def to_end(self, killed_at: int | None = None) -> Ended:
        """Run it to its end, or until it has taken `GIVE_UP_S`.

        Args:
            killed_at: Number of answers after which all its processes are killed; None kills none.
        """
        self._server.reset()
        path = str(HERE.parents[1]) if self._peer.environment is None else ""
        variables = os.environ | self._peer.variables | {"PYTHONPATH": path}
        began, at = time.perf_counter(), time.time()
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=variables
            )
        with _Family(process.pid) as family:
            late = threading.Timer(GIVE_UP_S, family.kill)
            killer = threading.Thread(target=self._kill, args=(family, killed_at), name="kills")
            late.start()
            killer.start()
            _, status, used = os.wait4(process.pid, 0)
            wall_s = time.perf_counter() - began
            late.cancel()
            asked = self._server.asked()
            self._server.reset()
            killer.join()
            family.kill()
        process.returncode = os.waitstatus_to_exitcode(status)
        return Ended(
            process.returncode,
            wall_s,
            max(family.cpu_s, used.ru_utime + used.ru_stime),
            family.peak_mib,
            asked["first_at"] - at if asked["first_at"] else None,
            Counter(asked["arrived"]),
            Counter(asked["answered"]),
        )

    def numbers(self) -> Counter[int]:
        """Return how often each prompt's number is among the rows that it has written."""
        return Counter(json.loads((self._out / "numbers.json").read_text()))

    def last_lines(self) -> str:
        """Return the end of what it printed."""
        return "\n".join(self._log.read_text(errors="replace").strip().splitlines()[-6:])

    def _kill(self, family: "_Family", answered: int | None) -> None:
        if answered is not None:
            self._server.asked(answered)
            family.kill()


class _Family:
    """A process and all processes below it: their CPU time and memory, sampled within the block."""

    def __init__(self, pid: int) -> None:
        self._seen = {pid: psutil.Process(pid)}
        self._cpu: dict[int, float] = {}
        self._ended = threading.Event()
        self.peak_mib = 0.0

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._sample, name="samples")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all processes seen."""
        return sum(self._cpu.values())

    def kill(self) -> None:
        """SIGKILL to all of them."""
        for process in list(self._seen.values()):
            with _unless_gone():
                process.kill()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLED_EVERY_S):
            memory = 0.0
            for process in list(self._seen.values()):
                with _unless_gone():
                    for child in process.children(recursive=True):
                        self._seen.setdefault(child.pid, child)
            for pid, process in list(self._seen.items()):
                with _unless_gone():
                    times = process.cpu_times()
                    self._cpu[pid] = times.user + times.system
                    memory += process.memory_info().rss / 2**20
            self.peak_mib = max(self.peak_mib, memory)


@contextmanager
def _unless_gone() -> Iterator[None]:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        yield
