"""What the benchmarks share: a simulator of their own, seeds in any number."""

import re
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import orjson


class Simulator:
    """A simulated server as a process of its own, on a free port, while the block runs."""

    def __init__(self, *options: str) -> None:
        self._command = [sys.executable, "-m", "streamsyn", "simulate", "--port", "0", *options]

    def __enter__(self) -> str:
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        found = re.search(r"http://\S+", self._process.stderr.readline())
        if found is None:
            raise RuntimeError("the simulator did not start")
        return found.group()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()


def seeds_file(folder: Path, number: int) -> Path:
    """A file of so many seeds, all different; made once."""
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
