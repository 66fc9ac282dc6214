"""TRL's SFTTrainer in two processes on a live run, killed and resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from streamsyn.following.run_rows import FolderWatch
from tests.docs.test_guides import free_port
from tests.trainer.test_sample_position import answers, write


def start(run: Path, out: Path) -> list[subprocess.Popen[bytes]]:
    """Both processes of a training."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.trainer.trl_process", str(run), str(out)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]


@pytest.mark.torture  # test_sample_position has one process
@pytest.mark.timeout(240)
def test_each_row_is_trained_on_once_by_two_processes(tmp_path: Path) -> None:
    """Killed while they wait for rows, after a step that no checkpoint has, and resumed."""
    run, out = tmp_path / "run", tmp_path / "out"
    out.mkdir()
    write(run, 17, finish=False)  # four steps of four rows, of which the fourth waits for a look at the next
    killed = start(run, out)
    record = out / "trained-0.jsonl"
    watch = FolderWatch()
    while not record.exists() or record.read_bytes().count(b"\n") < 3:
        assert all(process.poll() is None for process in killed)
        watch.add([out])
        watch.wait(1.0)
    watch.close()
    for process in killed:
        process.kill()
        process.wait()
    write(run, 11, finish=True)
    resumed = start(run, out)

    assert [0, 0] == [process.wait() for process in resumed]
    steps: dict[tuple[int, int], list[str]] = {}
    for rank in range(2):
        for line in (out / f"trained-{rank}.jsonl").read_text().splitlines():
            step, trained = json.loads(line)
            steps[step, rank] = trained
    assert answers(0, 28) == [answer for at in sorted(steps) for answer in steps[at]]
