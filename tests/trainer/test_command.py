"""`streamsyn train` as a user has it: processes, signals, kills, full disks."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Lfm2Config, Lfm2ForCausalLM

from streamsyn.config.fingerprint import fingerprint, with_absolute_paths
from streamsyn.config.loading import Config
from streamsyn.sink.rundir import RunDirectory
from tests.builders import context, opened, sample, sink
from tests.trainer import tiny
from tests.trainer.conftest import Start, lines

pytestmark = pytest.mark.timeout(300)


def written(number: int) -> Any:
    """The sample of a seed, as a run would write it; some are too long."""
    words = random.Random(number).choices(["tide", "lamp", "keeper", "stone", "gull"], k=5 + 13 * number % 31)
    asked = f"{' '.join(words)}\n\nWho kept {number}?"
    messages = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": f"Keeper {number * 7919}."},
    ]
    return sample(number, messages=messages)


def write_run(root: Path, numbers: range, *, final: bool = True) -> Path:
    """A run directory with samples, finished or not."""
    config = Config()
    directory = RunDirectory(root)
    directory.save(with_absolute_paths(config), fingerprint(config))
    directory.close()
    with opened(root, sink(shard_bytes=4000)) as log:
        log.append([context(n) for n in numbers])
        log.samples.append([written(n) for n in numbers])
        if final:
            log.seal_outcomes()
            log.finish()
    return root


def result(out: Path) -> dict[str, torch.Tensor]:
    """The tuned weights."""
    return load_file(out / "model" / "model.safetensors")


def lineage(out: Path) -> list[tuple[int, list[Any]]]:
    """For each step in trained.jsonl, its examples with their losses."""
    found = [json.loads(line) for line in (out / "trained.jsonl").read_text().splitlines()]
    return [(line["step"], line["examples"]) for line in found]


def saved(out: Path) -> int:
    """The step of the newest checkpoint."""
    latest = out / "LATEST"
    return int(latest.read_text().removeprefix("step-")) if latest.exists() else 0


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether all weights are equal, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_finished_run_is_trained_on(start: Start, tmp_path: Path) -> None:
    """Exit 0 at the end of the stream, and the loss has fallen. Held-out samples were measured with their
    contexts and without. A second start has nothing to do and changes nothing.
    """
    run, out = write_run(tmp_path / "run", range(60)), tmp_path / "out"
    training = start(run, out)

    assert 0 == training.wait(), training.stderr()
    steps = lines(out)
    assert steps[-1]["loss"] < steps[0]["loss"]
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in found if line["kind"] == "evaluation"]
    assert measured[0]["step"] == 0
    assert measured[-1]["nll_with_context"] < measured[0]["nll_with_context"]
    assert {"nll_with_context", "nll_without_context", "context_gain", "held_out"} <= measured[-1].keys()
    ended = found[-1]
    assert ("end", steps[-1]["step"], "the stream ended") == (ended["kind"], ended["step"], ended["why"])
    assert sum(len(examples) for _, examples in lineage(out)) == ended["examples"]
    assert ended["verdict"] in {"training-bound", "reading-bound"}, "a finished run is not waited for"
    before = result(out)
    again = start(run, out)
    assert 0 == again.wait(), again.stderr()
    assert same(before, result(out))
    assert len(steps) == len(lines(out))


@pytest.mark.crash
def test_kills_change_nothing_in_the_result(start: Start, tmp_path: Path) -> None:
    """SIGKILL at random moments, resumed each time: over a complete log and with one thread, the final
    weights are bit-equal to those of an undisturbed training.
    """
    run = write_run(tmp_path / "run", range(160))
    whole = start(run, tmp_path / "whole")
    assert 0 == whole.wait(), whole.stderr()
    rng, out = random.Random(0), tmp_path / "out"
    for _ in range(3):
        training = start(run, out, save_every_steps=2)
        training.wait_for_steps(out, saved(out) + rng.randint(3, 6))  # more than a kill left behind it
        training.kill()
        assert -signal.SIGKILL == training.wait(), training.stderr()
    last = start(run, out)
    assert 0 == last.wait(), last.stderr()

    assert same(result(tmp_path / "whole"), result(tmp_path / "out"))
    steps, expected = lines(tmp_path / "out"), lines(tmp_path / "whole")
    for key in ("step", "loss", "rate", "tokens"):
        assert [line[key] for line in expected] == [line[key] for line in steps]
    assert lineage(tmp_path / "whole") == lineage(tmp_path / "out")
    whole_losses, losses = ((tmp_path / name / "task_losses.json").read_text() for name in ("whole", "out"))
    assert whole_losses == losses


@pytest.mark.crash
def test_a_kill_before_the_first_checkpoint_starts_over(start: Start, tmp_path: Path) -> None:
    """With the evaluation before the first step, too: later ones are compared with it."""
    run = write_run(tmp_path / "run", range(40))
    given = {"save_every_steps": 1000, "eval_every_steps": 4}
    undisturbed, killed = tmp_path / "whole", tmp_path / "killed"
    assert 0 == start(run, undisturbed, **given).wait()
    training = start(run, killed, **given)
    training.wait_for_steps(killed, 1)
    training.kill()
    training.wait()
    assert not (killed / "LATEST").exists()
    assert 0 == start(run, killed, **given).wait()

    # How many samples are held out by then depends on how far reading has come, and so does their loss.
    found = evaluations(killed)
    assert [one["step"] for one in evaluations(undisturbed)] == [one["step"] for one in found]
    assert 0.0 == found[0]["nll_with_context_change"] > found[-1]["nll_with_context_change"]
    assert lineage(undisturbed) == lineage(killed)


def evaluations(out: Path) -> list[dict[str, Any]]:
    """The evaluations in metrics.jsonl, without their times."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name == "step" or name.startswith("nll_")}
        for line in found
        if line["kind"] == "evaluation"
    ]


@pytest.mark.crash
def test_a_signal_saves_and_the_training_resumes(start: Start, tmp_path: Path) -> None:
    """SIGTERM ends a training after the current step, saved, with 75; resumed, the final weights are those of
    an undisturbed training.
    """
    run = write_run(tmp_path / "run", range(60))
    whole = start(run, tmp_path / "whole")
    assert 0 == whole.wait(), whole.stderr()
    training = start(run, tmp_path / "out", save_every_steps=1000)
    training.wait_for("train.step")
    training.kill(signal.SIGTERM)

    assert 75 == training.wait(), training.stderr()
    assert re.search(r"train\.saved +step=", training.stderr())
    assert "a signal" == json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])["why"]
    assert not (tmp_path / "out" / "model").exists()
    rest = start(run, tmp_path / "out")
    assert 0 == rest.wait(), rest.stderr()
    assert same(result(tmp_path / "whole"), result(tmp_path / "out"))


def test_two_signals_together_are_one(start: Start, tmp_path: Path) -> None:
    """A signal from a service manager, and the same one forwarded by a launcher: nothing is lost."""
    run = write_run(tmp_path / "run", range(60), final=False)
    training = start(run, tmp_path / "out", save_every_steps=1000)
    training.wait_for_steps(tmp_path / "out", 2)
    training.kill(signal.SIGTERM)
    training.kill(signal.SIGINT)

    assert 75 == training.wait(), training.stderr()
    assert f"step-{len(lines(tmp_path / 'out')):07}" == (tmp_path / "out" / "LATEST").read_text().strip()


def test_an_empty_stream_fails(start: Start, tmp_path: Path) -> None:
    """Nothing to train on is a failure: exit 1, and no model."""
    training = start(write_run(tmp_path / "run", range(0)), tmp_path / "out")

    assert 1 == training.wait(), training.stderr()
    assert "without a sample" in training.stderr()
    assert not (tmp_path / "out" / "model").exists()


def test_a_stalled_stream_stops_with_on_stall(start: Start, tmp_path: Path) -> None:
    """With `on_stall` = stop, what is there is trained on and saved, exit 75; when the run continues, so does
    the training.
    """
    run = write_run(tmp_path / "run", range(20), final=False)
    training = start(run, tmp_path / "out", stall_s=0.5, on_stall="stop", max_wait_s=0.1)

    assert 75 == training.wait(), training.stderr()
    assert "train.stalled" in training.stderr()
    write_run(run, range(20, 40))
    rest = start(run, tmp_path / "out", on_stall="stop", max_wait_s=0.1)
    assert 0 == rest.wait(), rest.stderr()
    trained = sum(line["examples"] for line in lines(tmp_path / "out"))
    held_out = lines(tmp_path / "out")[-1]["stream"]["held_out"]
    assert 40 == trained + held_out


def test_a_stalled_stream_is_waited_for(start: Start, tmp_path: Path) -> None:
    """With `wait`, the default, the stall is logged once, and training continues when the run does."""
    run = write_run(tmp_path / "run", range(20), final=False)
    training = start(run, tmp_path / "out", stall_s=1.0)
    training.wait_for("train.stalled")
    write_run(run, range(20, 40))

    assert 0 == training.wait(), training.stderr()
    assert 1 == training.stderr().count("train.stalled")


def test_a_full_disk_stops_it_and_it_resumes_with_room(start: Start, tmp_path: Path) -> None:
    """One line, exit 1, and earlier checkpoints are whole; with room, the training ends as if there had
    always been room.
    """
    run, out = write_run(tmp_path / "run", range(40)), tmp_path / "out"
    whole = start(run, tmp_path / "whole", decay_steps=0)
    assert 0 == whole.wait(), whole.stderr()
    first = start(run, out, decay_steps=0, max_steps=3)
    assert 0 == first.wait(), first.stderr()
    full = start(run, out, decay_steps=0, file_bytes=50_000)

    assert 1 == full.wait(), full.stderr()
    last = full.stderr().splitlines()[-1]
    assert re.match(r"streamsyn: cannot write .*step-0000004.*what was saved before it is whole", last)
    assert "Traceback" not in full.stderr()
    rest = start(run, out, decay_steps=0)
    assert 0 == rest.wait(), rest.stderr()
    assert lines(tmp_path / "whole")[-1]["loss"] == lines(out)[-1]["loss"]


def test_a_different_training_in_the_same_directory_is_refused(start: Start, tmp_path: Path) -> None:
    """Exit 2, and the key that differs with both values; operational keys may differ."""
    run, out = write_run(tmp_path / "run", range(6)), tmp_path / "out"
    assert 0 == start(run, out).wait()
    assert 0 == start(run, out, save_every_steps=7, keep_checkpoints=5, eval_every_steps=3).wait()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"loss": "token"}, "train.loss: 'sequence' before, 'token' now"),
        ({"seq_len": 128}, "train.seq_len: 256 before, 128 now"),
        ({"learning_rate": 0.1}, "train.learning_rate"),
    ]
    for changed, named in changes:
        other = start(run, out, **changed)

        assert 2 == other.wait()
        assert named in other.stderr()


@pytest.mark.parametrize(
    ("named", "source", "out", "more"),
    [
        ("http://host:1 is of no known format", "http://host:1", "out", []),
        ("odd", "odd", "out", []),
        ("no such directory", "run", "out", ["--model", "./nowhere"]),
        ("is not a model", "run", "out", ["--model", "odd"]),
        ("train.rows_per_step", "run", "out", ["--set", "train.rows_per_step=0"]),
        ("is a run directory", "run", "other", []),
        ("the same directory", "run", "run", []),
        ("unknown key train.seqlen", "run", "out", ["--set", "train.seqlen=3"]),
    ],
)
def test_mistakes_are_one_line(
    start: Start, tmp_path: Path, named: str, source: str, out: str, more: list[str]
) -> None:
    """Exit 2 and one line that names what is wrong, without a traceback."""
    write_run(tmp_path / "run", range(4))
    write_run(tmp_path / "other", range(4))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "picture.png").write_bytes(b"x")
    given = source if "://" in source else tmp_path / source
    training = start(given, tmp_path / out, *(str(tmp_path / "odd") if one == "odd" else one for one in more))

    assert 2 == training.wait(), training.stderr()
    assert named in training.stderr().splitlines()[-1]
    assert "Traceback" not in training.stderr()


def test_a_directory_in_use_is_refused(start: Start, server: subprocess.Popen[str], tmp_path: Path) -> None:
    """Two trainings never share an OUT."""
    from streamsyn.trainer.outdir import OutDirectory

    directory = OutDirectory(tmp_path / "out")
    training = start(write_run(tmp_path / "run", range(4)), tmp_path / "out")

    assert 2 == training.wait()
    assert "in use by another process" in training.stderr()
    directory.close()


def test_samples_on_stdin_are_trained_on_once(start: Start, tmp_path: Path) -> None:
    """NDJSON on stdin, killed and resumed without stdin: the spool has what was read."""
    samples = tmp_path / "samples.jsonl"
    rows = [
        {"id": f"s{n}", "seed_id": f"s{n}", "task": "qa", "messages": written(n).messages} for n in range(30)
    ]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    training = start("-", out, stdin=samples)

    assert 0 == training.wait(), training.stderr()
    trained = sum(line["examples"] for line in lines(out))
    assert 30 == trained + lines(out)[-1]["stream"]["held_out"]
    assert (out / "model" / "model.safetensors").exists()


def test_missing_packages_are_named(tmp_path: Path) -> None:
    """Without torch, `--help` works, and a training names what to install: exit 2."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "streamsyn", "train"]
    helped = subprocess.run(
        [*command, "--help"], env=environment, capture_output=True, text=True, check=False
    )
    given = ["--from", str(tmp_path), "--model", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *given], env=environment, capture_output=True, text=True, check=False)

    assert (0, "") == (helped.returncode, helped.stderr)
    assert 2 == done.returncode
    assert "streamsyn: training needs torch: pip install 'streamsyn[train]'\n" == done.stderr


def test_one_sample_a_row_trains_the_same(start: Start, tmp_path: Path) -> None:
    """With `train.packing = "none"` weights and evaluations are those of packed rows, up to rounding."""
    run = write_run(tmp_path / "run", range(40))
    for packing in ("auto", "none"):
        training = start(run, tmp_path / packing, packing=packing)
        assert 0 == training.wait(), training.stderr()
        assert ("one sample a row" in training.stderr()) is (packing == "none")

    packed, alone = (result(tmp_path / packing) for packing in ("auto", "none"))
    assert tiny.furthest(packed, alone) < 1e-5
    packed_losses, alone_losses = (
        [
            (line["step"], pytest.approx(line["nll_with_context"], rel=1e-4))
            for line in lines(out, "evaluation")
        ]
        for out in (tmp_path / "auto", tmp_path / "none")
    )
    assert packed_losses == alone_losses


def test_a_recurrent_model_is_trained_one_sample_a_row(start: Start, tmp_path: Path) -> None:
    """By itself, with one line in the log that says so and why."""
    shape: Any = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "pad_token_id": 256,
        "eos_token_id": 256,
    }
    config = Lfm2Config(vocab_size=tiny.VOCABULARY, layer_types=["conv", "full_attention"], **shape)
    torch.manual_seed(0)
    Lfm2ForCausalLM(config).save_pretrained(tmp_path / "base")
    training = start(write_run(tmp_path / "run", range(12)), tmp_path / "out")
    assert 0 == training.wait(), training.stderr()

    assert ["one sample a row: a sample's logits depend on the sample before it in its row"] == re.findall(
        r'train.packing .*why="(.*)"', training.stderr()
    )
    assert any("conv" in name for name in result(tmp_path / "out"))
