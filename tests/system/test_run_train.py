"""`streamsyn run --train`: a training that goes on beside the run, kept up and stopped in order."""

import fcntl
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import Server, assert_clean, environment, rows, start, streamsyn, wait_for_line
from tests.trainer import tiny

pytestmark = pytest.mark.timeout(180)

Serve = Callable[..., Server]
Seeds = Callable[..., Path]

RUN = ("--set", "checks.min_words=5", "--set", "assembly.contexts_per_sample=2", "--no-progress")
ONE_THREAD = environment(OMP_NUM_THREADS="1")
TRAIN = """
[train]
model = "{model}"
launcher = {launcher}
seq_len = 1024
rows_per_step = 2
shuffle_size = 8
shuffle_min = 4
max_wait_s = 0.5
learning_rate = 0.001
save_every_steps = {every}
"""


def config(folder: Path, launcher: str | None = None, every: int = 100) -> Path:
    """A configuration; `launcher` is a program in Python that is run in place of the trainer."""
    given: list[str] = []
    if launcher is not None:
        (folder / "launcher.py").write_text(launcher)
        given = [sys.executable, str(folder / "launcher.py")]
    path = folder / "train.toml"
    model = tiny.write_model(folder / "base")
    path.write_text(TRAIN.format(model=model, launcher=json.dumps(given), every=every))
    return path


def command(server: Server, seeds: Path, out: Path, training: Path, *more: object) -> list[object]:
    """A run with a training."""
    return ["run", "--seeds", seeds, "--server", server.url, "--out", out, "--train", training, *RUN, *more]


def trained(out: Path) -> int:
    """Examples in all steps."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return sum(line["examples"] for line in found if line["kind"] == "step")


OBEDIENT = """
import fcntl, os, socket, sys
run = sys.argv[sys.argv.index("--from") + 1]
print("here", os.getpid(), flush=True)
line = socket.socket(fileno=0)
while line.recv(16):
    pass
with open(run + "/.lock") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("saved behind the run", flush=True)
line.send(b"75")
sys.exit(1)
"""
"""In place of a trainer: says whether the run had let go of its directory when it was told to stop. Like a
launcher's, its exit status says nothing."""

REFUSING = """
import sys
print("streamsyn: that is no model")
print("a launcher's own words")
sys.exit(2)
"""

DEAF = """
import os, time
print("here", os.getpid(), flush=True)
time.sleep(1000)
"""


def interrupted(process: subprocess.Popen[bytes]) -> None:
    """Send what Ctrl-C at a terminal sends: SIGINT to the whole group."""
    os.killpg(process.pid, signal.SIGINT)


def stderr_after(process: subprocess.Popen[bytes], timeout_s: float = 100) -> str:
    """The rest of stderr, until it and all that it started have ended."""
    return process.communicate(timeout=timeout_s)[1].decode()


@pytest.mark.crash
def test_one_interrupt_stops_the_run_and_then_the_training(
    tmp_path: Path, serve: Serve, seeds: Seeds
) -> None:
    """The trainer does not get the signal; it is told once the run has drained and released its directory.
    Exit 75.
    """
    out = tmp_path / "out"
    server = serve("--latency-ms", "200")
    given = command(server, seeds(100), out, config(tmp_path, OBEDIENT), "--set", "fleet.max_in_flight=4")
    process = start(*given, start_new_session=True)
    wait_for_line(process, r"trainer\| here")
    interrupted(process)
    stderr = stderr_after(process)

    assert 75 == process.returncode, stderr
    assert "trainer| saved behind the run" in stderr
    assert stderr.index("finishing what is in flight") < stderr.index("trainer| saved")
    assert_clean(out)


@pytest.mark.crash
def test_an_interrupt_that_leaves_a_run_nothing_to_do_stops_the_training(
    tmp_path: Path, serve: Serve, seeds: Seeds
) -> None:
    """The rest was in flight, so the run comes to its end; the training is stopped, not waited for. Exit
    75."""
    server = serve("--latency-ms", "3000")
    process = start(
        *command(server, seeds(1), tmp_path / "out", config(tmp_path, OBEDIENT)), start_new_session=True
    )
    wait_for_line(process, r"trainer\| here")
    interrupted(process)
    stderr = stderr_after(process)

    assert 75 == process.returncode, stderr
    assert "trainer| saved behind the run" in stderr


def test_a_second_interrupt_ends_both_at_once(tmp_path: Path, serve: Serve, seeds: Seeds) -> None:
    """Neither requests in flight nor a trainer that does not react are waited for."""
    server = serve("--latency-ms", "60000")
    process = start(
        *command(server, seeds(9), tmp_path / "out", config(tmp_path, DEAF)), start_new_session=True
    )
    wait_for_line(process, r"trainer\| here")
    interrupted(process)
    wait_for_line(process, "finishing what is in flight")
    interrupted(process)
    stderr_after(process, 50)

    assert 75 == process.returncode


def test_a_second_interrupt_ends_a_trainer_that_takes_too_long(
    tmp_path: Path, serve: Serve, seeds: Seeds
) -> None:
    """Also when the run has ended, and only the training is waited for."""
    process = start(
        *command(serve(), seeds(9), tmp_path / "out", config(tmp_path, DEAF)), start_new_session=True
    )
    wait_for_line(process, "run.waits_for_training")
    interrupted(process)
    process.terminate()  # another signal: of two that are the same, one may be all that comes
    stderr_after(process, 50)

    assert 75 == process.returncode


def test_a_trainer_outlives_its_run_only_to_save(tmp_path: Path, serve: Serve, seeds: Seeds) -> None:
    """The trainer of a run that is killed saves and exits."""
    server = serve("--latency-ms", "60000")
    process = start(*command(server, seeds(9), tmp_path / "out", config(tmp_path, OBEDIENT)))
    pid = int(wait_for_line(process, r"trainer\| here").split()[-1])
    ended = os.pidfd_open(pid)
    process.kill()
    stderr_after(process)

    assert [ended] == select.select([ended], [], [], 100)[0]
    os.close(ended)


@pytest.mark.crash
def test_a_trainer_waits_for_the_one_before_it(tmp_path: Path, serve: Serve, seeds: Seeds) -> None:
    """A trainer whose run was killed may still be saving: the next one waits for it."""
    training = tmp_path / "out" / "training"
    training.mkdir(parents=True)
    given = command(serve("--words", "30"), seeds(9), tmp_path / "out", config(tmp_path))
    with (training / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(*given, env=ONE_THREAD)
        wait_for_line(process, r"trainer\|.*train.waits")
    stderr = stderr_after(process)

    assert 0 == process.returncode, stderr
    assert 9 == trained(training)


@pytest.mark.crash
def test_a_training_runs_beside_a_run(tmp_path: Path, serve: Serve, seeds: Seeds) -> None:
    """Killed, it is restarted, with one log line. In the end each sample of the run was trained on once, the
    run directory is sound, and the trainer's lines are marked. Without --train the run works as ever.
    """
    out = tmp_path / "out"
    given = command(serve("--words", "30"), seeds(40), out, config(tmp_path, every=1))
    process = start(*given, env=ONE_THREAD)
    found = re.search(r"pid=(\d+)", wait_for_line(process, "^[^|]*trainer.started"))
    assert found is not None
    wait_for_line(process, r"^trainer\|.*train.saved")
    os.kill(int(found.group(1)), signal.SIGKILL)
    stderr = stderr_after(process)

    assert 0 == process.returncode, stderr
    assert 1 == stderr.count("trainer.restarts")
    assert re.search(r"trainer.restarts +because='it was ended by signal 9'", stderr)
    assert 40 == trained(out / "training")
    assert (out / "training" / "model" / "model.safetensors").exists()
    assert_clean(out)
    assert 0 == streamsyn("run", "--out", out, *RUN).returncode


@pytest.mark.crash
def test_a_trainer_that_dies_again_and_again_is_given_up(tmp_path: Path, serve: Serve, seeds: Seeds) -> None:
    """Restarted three times; the run goes on to its end without it, and exits with 1 and the reason."""
    out, broken = tmp_path / "out", config(tmp_path, "import sys; print('no room'); sys.exit(1)")
    done = streamsyn(*command(serve(), seeds(12), out, broken))

    assert 1 == done.returncode, done.stderr
    assert 4 == done.stderr.count("trainer| no room")
    assert "streamsyn: the run finished, but its training failed: no room\n" in done.stderr
    assert 12 == len(rows(out, "contexts"))
    assert_clean(out)


def test_a_trainer_that_refuses_its_configuration_stops_the_run(
    tmp_path: Path, serve: Serve, seeds: Seeds
) -> None:
    """The run is drained, and exits with 2 and the trainer's message."""
    out, wrong = tmp_path / "out", config(tmp_path, REFUSING)
    given = command(serve("--latency-ms", "300"), seeds(200), out, wrong, "--set", "fleet.max_in_flight=4")
    done = streamsyn(*given)

    assert 2 == done.returncode, done.stderr
    assert "finishing what is in flight" in done.stderr
    assert (
        "streamsyn: the training cannot start or continue: that is no model" == done.stderr.splitlines()[-1]
    )
    assert len(rows(out, "contexts")) < 200
    assert_clean(out)


@pytest.mark.crash
def test_an_interrupted_training_is_resumed_with_its_run(tmp_path: Path, serve: Serve, seeds: Seeds) -> None:
    """With a real trainer: saved at the interrupt; the same command resumes both, to the end."""
    out, training = tmp_path / "out", config(tmp_path)
    server = serve("--words", "30", "--latency-ms", "300")
    given = command(server, seeds(60), out, training, "--set", "fleet.max_in_flight=1")
    process = start(*given, env=ONE_THREAD, start_new_session=True)
    wait_for_line(process, r"trainer\|.*train.step")
    interrupted(process)
    stderr = stderr_after(process)
    assert 75 == process.returncode, stderr
    assert (out / "training" / "LATEST").exists()
    resumed = streamsyn(*given, "--set", "fleet.max_in_flight=100", env=ONE_THREAD)

    assert 0 == resumed.returncode, resumed.stderr
    assert 60 == trained(out / "training")
    assert_clean(out)


def test_json_lines_of_both_are_objects(tmp_path: Path, serve: Serve, seeds: Seeds) -> None:
    """With --log-json, the trainer's lines are marked, and any other output of it becomes an object."""
    plain = "import sys; print('word'); print('{\"event\": \"train.step\"}'); sys.exit(0)"
    given = command(serve(), seeds(3), tmp_path / "out", config(tmp_path, plain), "--log-json")
    done = streamsyn(*given)
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stderr.splitlines()]

    assert 0 == done.returncode, done.stderr
    assert [("trainer.said", "word"), ("train.step", None)] == [
        (line["event"], line.get("text")) for line in lines if line.get("of") == "trainer"
    ]


def test_samples_may_go_to_stdout_too(tmp_path: Path, serve: Serve, seeds: Seeds) -> None:
    """The training follows the directory; nothing of it is written to stdout."""
    chatty = "import sys; print('word'); sys.exit(0)"
    given = command(serve(), seeds(5), tmp_path / "out", config(tmp_path, chatty), "--stdout")
    done = streamsyn(*given)

    assert 0 == done.returncode, done.stderr
    assert 5 == len([json.loads(line) for line in done.stdout.splitlines()])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[train]\nseq_len = 64", "train.model"),
        ("[train]\nmodel = './nowhere'", "no such directory"),
        ("[train]\nmodel = 'empty'", "no config.json"),
        ("[train]\nmodel = 'base'\nlr = 1", "unknown key train.lr"),
        ("[train]\nmodel = 'base'\nchat_template = 'none.jinja'", "train.chat_template"),
        ("[train]\nmodel = 'base'\nout = 'OUT'", "the same directory"),
        ("[train]\nmodel = 'base'\nlauncher = ['acelerate']", "train.launcher"),
        ("[train\n", "invalid TOML"),
        (None, "cannot read"),
    ],
)
def test_a_mistake_in_the_training_is_found_before_the_run(
    tmp_path: Path, seeds: Seeds, text: str | None, named: str
) -> None:
    """One line that names the file and what is wrong; exit 2; nothing was started."""
    tiny.write_model(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    if text is not None:
        (tmp_path / "train.toml").write_text(text)
    given = ["run", "--seeds", seeds(2), "--server", "http://127.0.0.1:9", "--out", "OUT"]
    done = streamsyn(*given, "--train", "train.toml", cwd=tmp_path)

    assert 2 == done.returncode
    assert 1 == len(done.stderr.splitlines())
    assert named in done.stderr
    assert "train.toml" in done.stderr
    assert not (tmp_path / "OUT").exists()
