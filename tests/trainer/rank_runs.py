"""Trainings of one or several ranks, started by one process that has imported everything."""

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.trainer import tiny
from tests.trainer.sharding import Kind
from tests.trainer.test_command import write_run

STEPS = 6
SETTINGS = {
    "train.seq_len": 256,
    "train.rows_per_step": 2,
    "train.shuffle_size": 8,
    "train.shuffle_min": 4,
    "train.learning_rate": 0.001,
    "train.warmup_steps": 2,
    "train.max_steps": STEPS,
    "train.decay_steps": 0,  # else the rate would fall before each of the limits at which some stop
    "train.max_wait_s": 60,
    "train.save_every_steps": 100,
}
EVERY, KEPT = 2, [2, 4, 6]
"""Steps between publications, and the steps whose publications are kept."""


class Ranks:
    """Runs trainings of one or several ranks over the same samples."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._folder = folder
        tiny.write_model(folder / "base")
        write_run(folder / "run", range(40))
        self.base = load_file(folder / "base" / "model.safetensors")
        """The initial weights."""
        self._alone: dict[str | None, Path] = {}

    def run(
        self,
        world: int,
        out: Path,
        kill: dict[str, Any] | None = None,
        sharded: Kind | None = None,
        model: Path | None = None,
        full: int | None = None,
        piece: int | None = None,
        **more: Any,
    ) -> list[int]:
        """Train; return the exit code of each rank. Their stderr is in OUT.said0, OUT.said1.

        Of the rank `full`, the disk is full. The head is applied to pieces of `piece` targets.
        """
        keys = SETTINGS | {f"train.{name}": value for name, value in more.items() if value is not None}
        sets = [part for name, value in keys.items() for part in ("--set", f"{name}={value}")]
        given = ["--from", self._folder / "run", "--model", model or self._folder / "base", "--out", out]
        return self.ask(["train", *map(str, given), *sets], world, out, kill, sharded, full, piece)

    def ask(
        self,
        argv: list[str],
        world: int,
        out: Path,
        kill: dict[str, Any] | None = None,
        sharded: Kind | None = None,
        full: int | None = None,
        piece: int | None = None,
    ) -> list[int]:
        """Run a command as the ranks of one training; return the exit code of each rank."""
        task = {"argv": argv, "world": world, "port": free_port(), "said": f"{out}.said"}
        task |= {"sharded": sharded, "kill": kill, "full": full, "piece": piece}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        codes: list[int] = json.loads(self._process.stdout.readline())
        return codes

    def by_hand(self, out: Path, steps: int) -> None:
        """Two ranks train on the plans of `by_hand`."""
        assert self.ask(["by-hand", str(out), str(steps)], 2, out) == [0, 0], said(out)

    def done(self, world: int, out: Path, **more: Any) -> Path:
        """Train to the end, and return OUT."""
        codes = self.run(world, out, **more)
        assert [0] * world == codes, said(out)
        return out

    def alone(self, lora: str | None) -> Path:
        """OUT of a training by one rank with publications, which is run once."""
        if lora not in self._alone:
            name = "alone" if lora is None else "alone-lora"
            self._alone[lora] = self.done(1, self._folder / name, lora=lora, publish=publishing())
        return self._alone[lora]


@contextmanager
def rank_runs() -> Iterator[Ranks]:
    """A process that has imported everything, with a model and samples."""
    shared = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "tests.trainer.forked_ranks"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | shared
        ) as process,
    ):
        yield Ranks(process, Path(folder))
        assert process.stdin is not None
        process.stdin.close()


def free_port() -> int:
    """A port below those that the system hands out, since seconds pass until torch binds it."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


def said(out: Path) -> str:
    """The stderr of all ranks, in all runs of a training."""
    return "".join(path.read_text() for path in sorted(out.parent.glob(f"{out.name}.said*")))


def publishing(*servers: str, keep: int = len(KEPT)) -> str:
    """`train.publish`."""
    return f"{{every_steps = {EVERY}, keep = {keep}, servers = {json.dumps(servers)}, timeout_s = 20}}"
