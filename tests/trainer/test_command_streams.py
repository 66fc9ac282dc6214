"""What somebody sees whose stream is slow, quick, cut off, or has samples that do not fit."""

import json
import os
import threading
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from tests.trainer.conftest import Start, Training, lines
from tests.trainer.test_command import write_run, written

pytestmark = pytest.mark.timeout(300)


def row(number: int, **more: Any) -> bytes:
    """A sample as it comes through a pipe."""
    named = {"id": f"s{number}", "seed_id": f"s{number}", "task": "qa"}
    return json.dumps({**named, "messages": written(number % 16).messages, **more}).encode() + b"\n"


def write_slowly(pipe: BinaryIO, out: Path, training: Training) -> int:
    """Write samples that fill no step, each after the one before was trained on; returns their number."""
    for number in range(8):
        pipe.write(row(number))
        pipe.flush()
        training.wait_for_steps(out, number + 1)
    return 8


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def test_a_slow_generator_is_waited_for_and_named(start: Start, tmp_path: Path, fifo: Path) -> None:
    """What is there is trained on when nothing more comes; the verdict is generation-bound."""
    out = tmp_path / "out"
    given = {"shuffle_min": 1, "holdout": 0.0, "max_wait_s": 0.3, "save_every_steps": 1000}
    training = start("-", out, stdin=fifo, **given)
    with fifo.open("wb") as pipe:
        samples = write_slowly(pipe, out, training)

    assert 0 == training.wait(), training.stderr()
    assert samples == sum(line["examples"] for line in lines(out))
    done, model = training.stderr().splitlines()[-2:]
    assert f"the tuned model is in {out}/model" in model
    assert "train.done" in done
    assert "verdict=generation-bound" in done


def test_a_source_that_fails_costs_no_step(start: Start, tmp_path: Path, fifo: Path) -> None:
    """What is mixed in is deleted meanwhile: one line, exit 2; the steps made so far are in a checkpoint."""
    out, mix = tmp_path / "out", tmp_path / "mix.jsonl"
    mix.write_bytes(row(1000))
    given: dict[str, Any] = {"shuffle_min": 1, "holdout": 0.0, "max_wait_s": 0.3, "save_every_steps": 1000}
    given["mix"] = f"[{{path = '{mix}', weight = 0.25}}]"
    training = start("-", out, stdin=fifo, **given)
    with fifo.open("wb") as pipe:
        pipe.write(row(0))
        pipe.flush()
        training.wait_for_steps(out, 1)
        mix.unlink()
        pipe.writelines(row(number) for number in range(1, 20))

    assert 2 == training.wait(), training.stderr()
    assert f"train.mix: {mix}" in training.stderr().splitlines()[-1]
    assert "Traceback" not in training.stderr()
    assert f"step-{len(lines(out)):07}" == (out / "LATEST").read_text().strip()


def test_a_slow_trainer_slows_the_writer(start: Start, tmp_path: Path, fifo: Path) -> None:
    """A pipe is read as samples are used: its writer ends long after training has begun."""
    out, many = tmp_path / "out", 240
    training = start("-", out, stdin=fifo, holdout=0.0, rows_per_step=1, save_every_steps=1000)
    rows = [row(number, note="-" * 60_000) for number in range(many)]  # 14 MB; 4 are read at once
    done: list[int] = []

    def write() -> None:
        with fifo.open("wb") as pipe:
            for one in rows:
                pipe.write(one)
        done.append(sum(line["examples"] for line in lines(out)))

    writer = threading.Thread(target=write)
    writer.start()

    assert 0 == training.wait(), training.stderr()
    writer.join()
    assert many == sum(line["examples"] for line in lines(out))
    assert many / 3 < done[0] < many
    assert "generation-bound" not in training.stderr().splitlines()[-1]


def test_a_stream_that_is_cut_off_is_trained_on(start: Start, tmp_path: Path, fifo: Path) -> None:
    """A writer that dies in the middle of a line: that line is named, all others are trained on, exit 0."""
    out = tmp_path / "out"
    training = start("-", out, stdin=fifo, holdout=0.0)
    with fifo.open("wb") as pipe:
        pipe.write(b"".join(row(number) for number in range(20)) + row(20)[:40])

    assert 0 == training.wait(), training.stderr()
    assert 20 == sum(line["examples"] for line in lines(out))
    assert "line 21 of stdin is not valid JSON" in training.stderr()
    assert {"bad_row": 1} == lines(out)[-1]["stream"]["dropped"]


def test_steps_beyond_the_declared_total_are_logged(start: Start, tmp_path: Path) -> None:
    """After `train.total_steps` the learning rate is 0, which is logged once."""
    run, out = write_run(tmp_path / "run", range(60)), tmp_path / "out"
    training = start(run, out, total_steps=2, warmup_steps=1)

    assert 0 == training.wait(), training.stderr()
    assert 1 == training.stderr().count("train.rate_is_zero")
    assert [True, True] + [False] * (len(lines(out)) - 2) == [bool(line["rate"]) for line in lines(out)]


def test_samples_that_are_too_long_are_counted(start: Start, tmp_path: Path) -> None:
    """Dropped with their length, or cut in the middle of the prompt: no word of an answer is ever lost."""
    run = write_run(tmp_path / "run", range(20))
    dropping = start(run, tmp_path / "dropped", seq_len=128, holdout=0.0)
    assert 0 == dropping.wait(), dropping.stderr()
    cutting = start(run, tmp_path / "cut", seq_len=128, holdout=0.0, overlong="truncate")
    assert 0 == cutting.wait(), cutting.stderr()

    assert "reason=overlong" in dropping.stderr()
    dropped = lines(tmp_path / "dropped")[-1]["stream"]["dropped"]["overlong"]
    assert f"dropped={dropped} " in dropping.stderr()
    assert 0 < dropped < 20
    assert 20 - dropped == sum(line["examples"] for line in lines(tmp_path / "dropped"))
    assert 20 == sum(line["examples"] for line in lines(tmp_path / "cut"))
    answers = sum(len(written(number).messages[-1]["content"]) + 1 for number in range(20))
    assert answers == sum(line["target_tokens"] for line in lines(tmp_path / "cut")), "a byte is a token"
