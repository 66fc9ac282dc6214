"""The loop closed: what is trained writes what it is trained on, and what it finds hard comes first."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.system.conftest import Server, environment, rows, start
from tests.trainer import tiny

pytestmark = pytest.mark.timeout(180)

TRAIN = {
    "train.seq_len": 512,
    "train.rows_per_step": 2,
    "train.shuffle_size": 8,
    "train.shuffle_min": 4,
    "train.max_wait_s": 0.2,
    "train.learning_rate": 0.01,
    "train.warmup_steps": 1,
    "train.save_every_steps": 4,
    "train.publish.every_steps": 10,
}
RUN = {
    "checks.min_words": 5,
    "assembly.contexts_per_sample": 1,
    "fleet.concurrency": 4,
    "run.queue_size": 1,
    "seeds.task_exponent": 2,
}
SEEDS = 120
"""Of each task."""


def sets(keys: Mapping[str, object]) -> list[str]:
    return [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]


def seeds(path: Path) -> Path:
    """Every second one has an answer that is learned at once, the others have a random one."""
    lines = []
    for n in range(SEEDS):
        hard = "".join(chr(33 + (n * 7919 + 31 * place**3) % 90) for place in range(60))
        for task, answer in (("easy", "yes " * 15), ("hard", hard)):
            seed = {"id": f"{task}-{n}", "instruction": f"Is it so, {n}?", "answer": answer, "task": task}
            lines.append(json.dumps(seed))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_loop_closes(tmp_path: Path, serve: Callable[..., Server]) -> None:
    """While one run goes on, a trainer that follows it hands its weights to the run's server, whose contexts
    carry their versions, and its losses to the run's seeds, of which the hard ones then come first; every
    seed has one outcome.
    """
    base, out, run = tiny.write_model(tmp_path / "base"), tmp_path / "out", tmp_path / "run"
    server = serve("--words", "20", "--latency-ms", "150")
    publish = {**TRAIN, "train.publish.servers": json.dumps([server.url])}
    command = ["train", "--from", run, "--wait", "--model", base, "--out", out, *sets(publish)]
    with (tmp_path / "stderr").open("wb") as said:
        training = start(*command, env=environment(OMP_NUM_THREADS="1"), stderr=said)
    until = time.monotonic() + 150
    while "train.start" not in (tmp_path / "stderr").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    losses = {**RUN, "seeds.task_losses": out / "task_losses.json"}
    command = ["run", "--seeds", seeds(tmp_path / "seeds.jsonl"), "--server", server.url, "--out", run]
    with (tmp_path / "run-stderr").open("wb") as said:
        running = start(*command, "--no-progress", *sets(losses), stderr=said)

    assert 0 == running.wait(120), (tmp_path / "run-stderr").read_text()
    assert 0 == training.wait(120), (tmp_path / "stderr").read_text()
    contexts = sorted(rows(run, "contexts"), key=lambda row: row["seq"])
    assert 2 * SEEDS == len({row["seed_id"] for row in contexts}) == len(contexts)
    versions = list(dict.fromkeys(row["weight_version"] for row in contexts))
    assert "default" == versions[0]
    assert len(versions) >= 3, (tmp_path / "stderr").read_text()
    assert sorted(versions[1:]) == versions[1:], "newer weights come later"
    assert {"simulated"} == {row["model"] for row in contexts}
    told = json.loads((out / "task_losses.json").read_text())["tasks"]
    assert told["hard"]["loss"] > told["easy"]["loss"]
    tasks = [row["task"] for row in contexts]
    assert 3 <= tasks[:8].count("hard") <= 5, "in the order of reading, as long as nothing is known"
    assert tasks[-40:].count("easy") > 28, tasks
    newest = (out / "weights/LATEST").read_text().strip()
    assert (out / "weights" / newest / "model.safetensors").exists()
    assert server.stats()["by_route"]["/continue_generation"] >= len(versions)
