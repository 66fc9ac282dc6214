"""`streamsyn train` in forks of one process that has imported torch."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.trainer import tiny

if TYPE_CHECKING:  # it imports tests that import this module
    from tests.trainer.rank_runs import Ranks

SETTINGS = {
    "train.seq_len": 256,
    "train.rows_per_step": 2,
    "train.shuffle_size": 8,
    "train.shuffle_min": 4,
    "train.learning_rate": 0.003,
    "train.warmup_steps": 2,
    "train.save_every_steps": 4,
    "train.max_wait_s": 0.2,
    "train.holdout": 0.1,
    "train.eval_every_steps": 5,
}


def lines(out: Path, kind: str = "step") -> list[dict[str, Any]]:
    """The steps in metrics.jsonl, or its lines of a different kind."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


class Training:
    """A command that runs in a fork."""

    def __init__(self, server: subprocess.Popen[str], stderr: Path) -> None:
        self._server = server
        self._stderr = stderr
        self._code: int | None = None
        self.pid = int(self._read("started")[0])

    def stderr(self) -> str:
        """What it has written so far."""
        return self._stderr.read_text() if self._stderr.exists() else ""

    def wait(self) -> int:
        """Wait for its exit code."""
        while self._code is None:
            pid, code = self._read("ended")
            assert self.pid == int(pid)
            self._code = int(code)
        return self._code

    def _read(self, expected: str) -> list[str]:
        assert self._server.stdout is not None
        event, *rest = self._server.stdout.readline().split()
        assert expected == event
        return rest

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, unless it has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self) -> None:
        """Kill it if it is still running."""
        if self._code is None:
            self.kill()
            self.wait()

    def wait_for(self, pattern: str, timeout_s: float = 60) -> None:
        """Wait until stderr matches. The one place that polls: it is a different process."""
        self._wait_until(lambda: re.search(pattern, self.stderr()) is not None, timeout_s)

    def wait_for_steps(self, out: Path, number: int, timeout_s: float = 60) -> None:
        """Wait until metrics.jsonl has this number of steps."""
        self._wait_until(lambda: (out / "metrics.jsonl").exists() and len(lines(out)) >= number, timeout_s)

    def _wait_until(self, holds: Callable[[], bool], timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < until, self.stderr()
            time.sleep(0.01)


@pytest.fixture(scope="session")
def server() -> Iterator[subprocess.Popen[str]]:
    """A process that has everything imported: one for all modules of tests that a worker runs."""
    command = [sys.executable, "-m", "tests.trainer.fork_server"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


Start = Callable[..., Training]


@pytest.fixture
def start(server: subprocess.Popen[str], tmp_path: Path) -> Iterator[Start]:
    """Starts `streamsyn train` with small settings, one at a time."""
    trainings: list[Training] = []

    def started(
        source: Any,
        out: Path | None,
        *more: str,
        base: str | None = "base",
        stdin: Path | None = None,
        file_bytes: int | None = None,
        **settings: Any,
    ) -> Training:
        assert server.stdin is not None
        stderr = tmp_path / f"stderr-{len(trainings)}"
        if trainings:
            trainings[-1].wait()
        chosen = {**SETTINGS, **{f"train.{key}": value for key, value in settings.items()}}
        sets = [part for key, value in chosen.items() for part in ("--set", f"{key}={value}")]
        given = {"--from": source, "--model": base and tmp_path / base, "--out": out}
        flags = [part for key, value in given.items() if value is not None for part in (key, str(value))]
        argv = ["train", *flags, *sets, *more]
        task = {
            "argv": argv,
            "stderr": str(stderr),
            "stdin": str(stdin) if stdin else None,
            "file_bytes": file_bytes,
        }
        server.stdin.write(json.dumps(task) + "\n")
        server.stdin.flush()
        trainings.append(Training(server, stderr))
        return trainings[-1]

    tiny.write_model(tmp_path / "base")
    yield started
    for training in trainings:
        training.end()


@pytest.fixture(scope="session")
def ranks() -> Iterator["Ranks"]:
    """Runs trainings of one or several ranks over the same samples."""
    from tests.trainer.rank_runs import rank_runs

    with rank_runs() as runs:
        yield runs
