"""Shared by the benchmarks: a simulator process, seed files, and the cost of a process."""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import TracebackType

import orjson

from streamsyn.simulator.texts import Prose


class Simulator:
    """Context manager: `streamsyn simulate` in its own process on a free port. Enters with its URL."""

    def __init__(self, *options: str) -> None:
        self._command = [sys.executable, "-m", "streamsyn", "simulate", "--port", "0", *options]

    def __enter__(self) -> str:
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        found = re.search(r"http://\S+", self._process.stderr.readline())
        if found is None:
            raise RuntimeError(f"the simulator did not print its URL: {' '.join(self._command)}")
        return found.group()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()


class VariedProse(Prose):
    """Writes texts whose lengths have a log-normal distribution around the given one.

    Args:
        seed: Determines texts and lengths.
        sigma: Standard deviation of the logarithm of the length.
    """

    def __init__(self, seed: int, sigma: float) -> None:
        super().__init__(seed)
        self._sigma = sigma
        self._lengths = Random(f"lengths {seed}")

    def write(self, words: int) -> str:
        """Return a text of about `words` words, more or less."""
        return super().write(round(words * self._lengths.lognormvariate(0, self._sigma)))


def seeds_file(folder: Path, number: int) -> Path:
    """Return a file of `number` different seeds in `folder`; written if it does not exist."""
    path = folder / f"seeds-{number}.jsonl"
    if not path.exists():
        with path.open("wb") as file:
            for index in range(number):
                seed = {
                    "instruction": f"Who kept the lighthouse in year {index}?",
                    "answer": f"Keeper {index * 7919}",
                }
                file.write(orjson.dumps(seed) + b"\n")
    return path


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds, CPU seconds and peak memory of one process."""

    wall_s: float
    cpu_s: float
    peak_mib: float


def measured(command: list[str]) -> Cost:
    """Run a command and return what its process used, from the kernel's accounting (`wait4`).

    Raises:
        RuntimeError: The exit code is not 0.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode} from: {' '.join(command)}")
    return Cost(time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def run_measured(*arguments: str) -> Cost:
    """Run a streamsyn command and return what its process used."""
    return measured([sys.executable, "-m", "streamsyn", *arguments])
