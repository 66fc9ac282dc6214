"""SIGKILL at random moments of a training and of the run it follows: each sample is trained on once."""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from streamsyn.trainer.examples import row_is_held_out
from tests.system.conftest import Server, assert_clean, rows, start, wait_for_line
from tests.trainer import tiny

pytestmark = pytest.mark.crash

KILLS = int(os.environ.get("STREAMSYN_KILLS", "6"))
SEED = int(os.environ.get("STREAMSYN_KILLS_SEED", "0"))
PIPE_KILLS = 2
LATE_KILLS = 2
"""Kills after the run has ended, in the second epoch."""
PATIENCE_S = 4.0
"""A moment that does not come within this time comes now."""
SETTINGS = {
    "train.seq_len": 512,
    "train.rows_per_step": 2,
    "train.epochs": 2,
    "train.shuffle_size": 12,
    "train.shuffle_min": 6,
    "train.max_wait_s": 0.2,
    "train.holdout": 0.1,
    "train.eval_every_steps": 1000,
    "train.save_every_steps": 3,
    "train.learning_rate": 0.001,
}
RUN = {
    "checks.min_words": 5,
    "assembly.contexts_per_sample": 2,
    "fleet.max_in_flight": 4,
    "sink.sync_interval_s": 0.05,
    "sink.shard_bytes": 20_000,
}


def sets(keys: dict[str, Any]) -> list[str]:
    return [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]


class Writer:
    """A run that reads its seeds from a pipe, so that it goes on for as long as needed."""

    def __init__(self, out: Path, server: Server) -> None:
        self._command = ["run", "--seeds", "-", "--server", server.url, "--out", out, "--no-progress"]
        self._lines: list[bytes] = []
        self._begin()

    def give(self, number: int) -> None:
        """So many more seeds."""
        first = len(self._lines)
        new = [
            json.dumps({"instruction": f"Who kept lighthouse {n}?", "answer": f"Keeper {n * 7919}."}) + "\n"
            for n in range(first, first + number)
        ]
        self._lines += map(str.encode, new)
        self._write(self._lines[first:])

    def kill(self) -> None:
        """And begin again, with the same seeds."""
        self._process.kill()
        self._process.communicate()
        self._begin()
        self._write(self._lines)

    def is_running(self) -> bool:
        """Whether it still writes, or waits for seeds."""
        return self._process.poll() is None

    def end(self) -> int:
        """No more seeds come; the number of all of them."""
        _, stderr = self._process.communicate(timeout=60)
        assert self._process.returncode == 0, stderr.decode()
        return len(self._lines)

    def stop(self) -> None:
        """Whatever it does, it is over."""
        if self.is_running():
            self._process.kill()
            self._process.communicate()

    def _begin(self) -> None:
        self._process = start(*self._command, *sets(RUN), stdin=subprocess.PIPE)
        wait_for_line(self._process, "run.started")

    def _write(self, lines: list[bytes]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"".join(lines))
        self._process.stdin.flush()


class Trainings:
    """`streamsyn train`, again and again, in forks of a process that has torch."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        self.stderr = folder / "stderr"
        self._folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.trainer.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
        )

    def start(self, pipe: Path | None = None) -> int:
        """One more, on the run's directory or on a named pipe; its process."""
        assert self._server.stdin is not None
        source = str(self._folder / "run") if pipe is None else "-"
        given = [
            "train",
            "--from",
            source,
            "--wait",
            "--model",
            str(self._folder / "base"),
            "--out",
            str(self.out),
        ]
        stdin = None if pipe is None else str(pipe)
        task = {
            "argv": [*given, *sets(SETTINGS)],
            "stderr": str(self.stderr),
            "stdin": stdin,
            "file_bytes": None,
        }
        self._server.stdin.write(json.dumps(task) + "\n")
        return int(self._read("started")[0])

    def wait(self) -> int:
        """The exit code of the one that was started last."""
        return int(self._read("ended")[1])

    def ends_within(self, timeout_s: float) -> bool:
        """Wait for its end, at most this long."""
        assert self._server.stdout is not None
        return bool(select.select([self._server.stdout], [], [], timeout_s)[0])

    def stop(self) -> None:
        """Let go of the process with torch."""
        self._server.communicate(timeout=60)

    def _read(self, expected: str) -> list[str]:
        assert self._server.stdout is not None
        event, *rest = self._server.stdout.readline().split()
        assert expected == event
        return rest

    def trained(self) -> list[dict[str, Any]]:
        """The lines of trained.jsonl, a torn one left out."""
        return [json.loads(line) for line in self.record().splitlines(keepends=True) if line.endswith(b"\n")]

    def record(self) -> bytes:
        """All of trained.jsonl."""
        path = self.out / "trained.jsonl"
        return path.read_bytes() if path.exists() else b""

    def checkpoint(self) -> dict[str, Any]:
        """What the newest checkpoint says of itself."""
        latest = self.out / "LATEST"
        if not latest.exists():
            return {"step": 0, "totals": {"examples": 0}}
        info: dict[str, Any] = json.loads(
            (self.out / "checkpoints" / latest.read_text().strip() / "info.json").read_bytes()
        )
        return info


def moment(rng: random.Random, trainings: Trainings) -> Callable[[], bool]:
    """A random event to kill at: some steps later, during a checkpoint, or after one."""
    lines = trainings.record().count(b"\n")
    saved = (trainings.out / "LATEST").stat().st_mtime_ns if (trainings.out / "LATEST").exists() else 0
    match rng.choice(["steps", "torn", "saved"]):
        case "steps":
            more = rng.randint(1, 7)
            return lambda: trainings.record().count(b"\n") >= lines + more
        case "torn":
            return lambda: any((trainings.out / "checkpoints").glob("*.tmp"))
        case _:
            latest = trainings.out / "LATEST"
            return lambda: latest.exists() and latest.stat().st_mtime_ns > saved


def kill_once(rng: random.Random, trainings: Trainings, meanwhile: Callable[[], None]) -> int:
    """Start a training and kill it some time later; its exit code."""
    process = trainings.start()
    meanwhile()
    return kill(rng, trainings, process)


def kill(rng: random.Random, trainings: Trainings, process: int) -> int:
    """Kill it at some moment from now; its exit code."""
    if rng.random() < 1 / 3:
        trainings.ends_within(rng.uniform(0, 1.5))
    else:
        comes, until = moment(rng, trainings), time.monotonic() + PATIENCE_S
        while not comes() and time.monotonic() < until and not trainings.ends_within(0.002):
            pass
        trainings.ends_within(rng.uniform(0, 0.05))
    with suppress(ProcessLookupError):  # it may have come to its end
        os.kill(process, signal.SIGKILL)
    return trainings.wait()


def audit(trainings: Trainings, before: bytes) -> bytes:
    """What is behind the newest checkpoint was never changed, and is what that checkpoint says it is.

    Returns the record up to it.
    """
    assert trainings.record().startswith(before)
    lines, saved = trainings.trained(), trainings.checkpoint()
    behind = [line for line in lines if line["step"] <= saved["step"]]
    assert list(range(1, saved["step"] + 1)) == [line["step"] for line in behind]
    assert saved["totals"]["examples"] == sum(len(line["examples"]) for line in behind)
    seen = Counter((epoch, name) for line in behind for _, epoch, _, name, _ in line["examples"])
    assert all(times == 1 for times in seen.values())
    return b"".join(trainings.record().splitlines(keepends=True)[: len(behind)])


@pytest.fixture
def trainings(tmp_path: Path) -> Iterator[Trainings]:
    tiny.write_model(tmp_path / "base")
    made = Trainings(tmp_path)
    yield made
    made.stop()


@pytest.mark.torture
@pytest.mark.timeout(300)
def test_kill_at_thirty_random_moments_of_a_growing_run(
    serve: Callable[..., Server], trainings: Trainings, tmp_path: Path
) -> None:
    """After 30 kills of the training while the run goes on, some of the run too, and a few in the second
    epoch: every sample that is not held out was trained on once per epoch, relative to the restored weights.
    """
    rng = random.Random(SEED)
    server = serve("--words", "12", "--ms-per-token", "1", "--latency-ms", "40", "--jitter-ms", "30")
    writer = Writer(tmp_path / "run", server)
    before, lost = b"", 0
    try:
        for _ in range(KILLS):
            writer.give(rng.randint(5, 30))
            dies = rng.random() < 1 / 6
            code = kill_once(rng, trainings, writer.kill if dies else lambda: None)
            assert -signal.SIGKILL == code, trainings.stderr.read_text()
            assert writer.is_running()
            before = audit(trainings, before)
            lost += trainings.record() != before
        seeds = writer.end()
    finally:
        writer.stop()
    in_between = len(before.splitlines())
    for _ in range(LATE_KILLS):
        kill_once(rng, trainings, lambda: None)
        before = audit(trainings, before)
    trainings.start()

    assert 0 == trainings.wait(), trainings.stderr.read_text()[-3000:]
    assert trainings.record() == audit(trainings, before)
    assert 0 < in_between < trainings.checkpoint()["step"]
    assert lost > 0, "no kill came between two checkpoints"
    assert_each_trained_on_once(trainings, tmp_path / "run", seeds)


def assert_each_trained_on_once(trainings: Trainings, run: Path, seeds: int) -> None:
    """Once per epoch, except for held-out samples; and there is a sample for each seed."""
    samples = rows(run, "samples")
    wanted = {row["id"] for row in samples if not row_is_held_out(row, SETTINGS["train.holdout"])}
    trained = [(epoch, name) for line in trainings.trained() for _, epoch, _, name, _ in line["examples"]]
    assert seeds == len(samples) > len(wanted)
    assert Counter(trained) == Counter((epoch, name) for epoch in (0, 1) for name in wanted)
    assert 2 * len(wanted) == trainings.checkpoint()["totals"]["examples"]
    assert_clean(run)


@pytest.mark.timeout(180)
def test_a_pipe_that_is_replayed_loses_nothing(
    serve: Callable[..., Server],
    seeds: Callable[..., Path],
    trainings: Trainings,
    tmp_path: Path,
) -> None:
    """`run --stdout --replay | train --from -`: what was in the pipe when the trainer was killed comes again,
    what it had read is skipped.
    """
    rng = random.Random(SEED)
    server = serve("--words", "12", "--ms-per-token", "1", "--latency-ms", "40", "--jitter-ms", "30")
    out, pipe = tmp_path / "run", tmp_path / "pipe"
    command = ["run", "--seeds", seeds(90), "--server", server.url, "--out", out, "--stdout", "--replay"]
    os.mkfifo(pipe)
    before = b""
    for dies in [True] * PIPE_KILLS + [False]:
        process = trainings.start(pipe)
        with pipe.open("wb") as its:
            running = start(*command, "--no-progress", *sets(RUN), stdout=its, stderr=subprocess.DEVNULL)
        code = kill(rng, trainings, process) if dies else trainings.wait()
        assert code == (-signal.SIGKILL if dies else 0), trainings.stderr.read_text()
        assert running.wait(30) in {0, 75}
        before = audit(trainings, before)

    assert_each_trained_on_once(trainings, out, 90)
