"""Training on a run that is going on: in another directory, or at the other end of a pipe."""

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from streamsyn.trainer.examples import row_is_held_out
from tests.system.conftest import COMMAND, Server, environment, rows, start
from tests.trainer import tiny

pytestmark = pytest.mark.timeout(180)

SETTINGS = {
    "train.seq_len": 1024,
    "train.rows_per_step": 2,
    "train.shuffle_size": 8,
    "train.shuffle_min": 4,
    "train.max_wait_s": 1,
    "train.learning_rate": 0.001,
}
RUN = {"checks.min_words": 5, "assembly.contexts_per_sample": 2, "fleet.max_in_flight": 1}
ONE_THREAD = environment(OMP_NUM_THREADS="1")


def sets(keys: Mapping[str, object]) -> list[str]:
    return [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]


def figures(out: Path, kind: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def steps(out: Path) -> list[dict[str, float]]:
    return figures(out, "step")


@pytest.mark.torture
def test_training_follows_a_run(
    tmp_path: Path, serve: Callable[..., Server], seeds: Callable[..., Path]
) -> None:
    """Started before the run, it trains on every sample once and ends when the run ends; its first step is
    taken while the run goes on."""
    base, out, run = tiny.write_model(tmp_path / "base"), tmp_path / "out", tmp_path / "run"
    server = serve("--words", "30", "--ms-per-token", "2", "--latency-ms", "250")
    command = ["train", "--from", run, "--wait", "--model", base, "--out", out, *sets(SETTINGS)]
    with (tmp_path / "stderr").open("wb") as stderr:
        training = start(*command, env=ONE_THREAD, stderr=stderr)
    command = [
        "run",
        "--seeds",
        seeds(60),
        "--server",
        server.url,
        "--out",
        run,
        "--no-progress",
        *sets(RUN),
    ]
    running = start(*command, stderr=subprocess.DEVNULL)

    assert 0 == running.wait(120)
    assert 0 == training.wait(120), (tmp_path / "stderr").read_text()
    assert 60 == sum(step["examples"] for step in steps(out))
    final = (run / "manifest.jsonl").stat().st_mtime
    assert steps(out)[0]["at"] < final
    assert (out / "model" / "model.safetensors").exists()


@pytest.mark.torture
def test_training_reads_a_pipe(
    tmp_path: Path, serve: Callable[..., Server], seeds: Callable[..., Path]
) -> None:
    """`run --stdout | train --from -`: every sample once, but for those held out, whose loss is measured with
    contexts and without; both exit with 0."""
    base, out = tiny.write_model(tmp_path / "base"), tmp_path / "out"
    server = serve("--words", "30", "--ms-per-token", "1", "--latency-ms", "5")
    command = ["run", "--seeds", seeds(30), "--server", server.url, "--out", tmp_path / "run", "--stdout"]
    running = start(*command, *sets(RUN), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    given = [
        "train",
        "--from",
        "-",
        "--model",
        str(base),
        "--out",
        str(out),
        *sets({**SETTINGS, "train.holdout": 0.2}),
    ]
    trained = subprocess.run(
        [*COMMAND, *given], stdin=running.stdout, capture_output=True, text=True, check=False, env=ONE_THREAD
    )
    assert running.stdout is not None
    running.stdout.close()

    assert 0 == running.wait(60)
    assert 0 == trained.returncode, trained.stderr
    held = sum(row_is_held_out(row, 0.2) for row in rows(tmp_path / "run", "samples"))
    assert 30 - held == sum(step["examples"] for step in steps(out)) < 30
    measured = figures(out, "evaluation")[-1]
    assert {"nll_with_context", "nll_without_context", "context_gain"} <= measured.keys()
