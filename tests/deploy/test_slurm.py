"""`streamsyn deploy slurm`: the script, and what it does when Slurm's commands are in place of fakes."""

import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from streamsyn.cli.main import cli
from streamsyn.errors import ConfigError, LaunchError
from streamsyn.slurm import SlurmJob, render, submit

FAKES = {
    # Expands n[1-2] as Slurm does; notes a requeue.
    "scontrol": '[ "$1" = show ] && [ "$3" = "n[1-2]" ] && printf "n1\\nn2\\n" && exit; echo "$*" >> calls',
    # Runs the tasks of a step, each with its rank; what they would start notes its arguments.
    "srun": """
for word; do case $word in
  --ntasks=*) tasks=${word#*=};; --nodelist=*) hosts=${word#*=};; --*) ;;
  bash) break;; esac; shift; done
for ((rank = 0; rank < tasks; rank++)); do SLURM_PROCID=$rank HOSTS=$hosts "$@"; done
echo started > ready.fifo
exec sleep 60""",
    "python-sglang": 'echo "$HOSTS $*" >> servers-started',
    # A run: notes its arguments, and drains on TERM as one does.
    "streamsyn-fake": """
printf '%s\\n' "$@" > run-arguments
trap 'exit 75' TERM
exec 3<> ready.fifo
for ((n = 0; n < $REPLICAS; n++)); do read -r _ <&3; done
[ "$END" = now ] && exit 3
echo running > up.fifo
sleep 60 &
wait""",
}


def option_lines(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def job(out: Path, **given: object) -> SlurmJob:
    wanted = {"nodes": 2, "sglang_python": "python-sglang", "streamsyn": "streamsyn-fake"} | given
    return SlurmJob(out=out, model="my model", **wanted)  # type: ignore[arg-type]


class Batch:
    """A batch shell, with fakes first on PATH."""

    def __init__(self, folder: Path, one: SlurmJob, end: str) -> None:
        self.folder = folder
        commands = folder / "bin"
        commands.mkdir()
        for name, body in FAKES.items():
            (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (commands / name).chmod(0o755)
        for name in ("ready.fifo", "up.fifo"):
            os.mkfifo(folder / name)
        (folder / "job.sh").write_text(render(one))
        replicas = one.nodes // one.nodes_per_replica * one.replicas_per_node
        self.shell = subprocess.Popen(
            ["bash", "job.sh"],
            cwd=folder,
            env={
                "PATH": f"{commands}:{os.environ['PATH']}",
                "SLURM_JOB_NODELIST": "n[1-2]",
                "SLURM_JOB_ID": "7",
                "REPLICAS": str(replicas),
                "END": end,
            },
            start_new_session=True,
        )

    def until_up(self) -> None:
        """Wait until all servers were started and the run goes on."""
        (self.folder / "up.fifo").read_text()

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return sorted(path.read_text().splitlines()) if path.exists() else []


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Batch]]:
    """Starts the script of a job; what is left of it ends with the test."""
    started: list[Batch] = []

    def one(end: str = "late", **given: object) -> Batch:
        started.append(Batch(tmp_path, job(tmp_path / "it's out", **given), end))
        return started[-1]

    yield one
    for batch in started:
        os.killpg(batch.shell.pid, signal.SIGKILL)
        batch.shell.wait()


@pytest.mark.crash
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_drains_the_run_and_queues_the_job_again(
    start: Callable[..., Batch], number: signal.Signals
) -> None:
    """USR1 comes before the time limit, TERM at preemption: the run gets TERM, and its code is the job's."""
    batch = start(gpus_per_node=2, gpus_per_replica=1)
    batch.until_up()
    batch.shell.send_signal(number)

    assert 75 == batch.shell.wait(20)
    assert ["requeue 7"] == batch.lines("calls")


@pytest.mark.crash
def test_a_run_that_ends_by_itself_is_not_queued_again(start: Callable[..., Batch]) -> None:
    """Its exit code is the job's. Each server has a port and GPUs of its own; the run reads their list."""
    batch = start(
        "now", gpus_per_node=4, gpus_per_replica=2, config=Path("a b.toml"), settings=("run.seed=1",)
    )

    assert 3 == batch.shell.wait(20)
    assert [] == batch.lines("calls")
    servers = batch.folder / "it's out-slurm" / "servers"
    assert [f"http://{node}:{port}" for node in ("n1", "n2") for port in (30_000, 30_001)] == sorted(
        servers.read_text().splitlines()
    )
    started = [line.split() for line in batch.lines("servers-started")]
    assert [("n1", "30000", "0"), ("n1", "30001", "2"), ("n2", "30000", "0"), ("n2", "30001", "2")] == [
        (words[0], words[words.index("--port") + 1], words[words.index("--base-gpu-id") + 1])
        for words in started
    ]
    arguments = (batch.folder / "run-arguments").read_text().splitlines()
    assert ["run", "a b.toml", "--out", str(batch.folder / "it's out")] == arguments[:4]
    assert ["run.seed=1", "--set", f"fleet.servers_file={servers}"] == arguments[-3:]


@pytest.mark.crash
def test_a_replica_over_two_nodes_has_two_ranks(start: Callable[..., Batch]) -> None:
    """Each task expands its own rank; the first node is asked, and is where the ranks meet."""
    batch = start("now", gpus_per_node=8, gpus_per_replica=16)

    assert 3 == batch.shell.wait(20)
    started = batch.lines("servers-started")
    assert 2 == len(started)
    for rank, line in enumerate(started):
        assert line.startswith("n1,n2 ")
        assert line.endswith(
            f"--tp-size 16 --nnodes 2 --enable-cache-report --enable-metrics "
            f"--dist-init-addr n1:30001 --node-rank {rank}"
        )
    assert "http://n1:30000\n" == (batch.folder / "it's out-slurm" / "servers").read_text()


def test_dry_run_prints_the_script(tmp_path: Path) -> None:
    """Its options: time to drain before the limit, a requeue, nodes with all their GPUs, and those given."""
    config = tmp_path / "run.toml"
    config.write_text("run.drain_timeout_s = 90\n")
    words = (
        f"deploy slurm {config} --nodes 3 --model m --out {tmp_path}/out --partition gpu --qos low --dry-run"
    )
    shown = CliRunner().invoke(cli, [*shlex.split(words), "--sbatch-arg=--mem=0"])

    assert 0 == shown.exit_code, shown.output
    found = option_lines(shown.output)
    assert {
        "--nodes=3",
        "--gpus-per-node=8",
        "--signal=B:USR1@150",
        "--requeue",
        "--time=24:00:00",
        "--partition=gpu",
        "--qos=low",
        "--mem=0",
        f"--output={tmp_path}/out-slurm/job-%j.log",
    } <= set(found)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"gpus_per_replica": 3}, "--gpus-per-replica 3"),
        ({"gpus_per_replica": 16, "nodes": 3}, "--nodes 3"),
        ({"port": 80}, "--port 80"),
        ({"sbatch_args": ("mem=0",)}, "--sbatch-arg"),
        ({"sbatch_args": ("--mem=0\nrm",)}, "--sbatch-arg"),
    ],
)
def test_numbers_that_do_not_fit_are_named(tmp_path: Path, given: dict[str, object], named: str) -> None:
    """With the option to change."""
    with pytest.raises(ConfigError, match=named):
        job(tmp_path, **given)


@pytest.mark.crash
def test_sbatch_gets_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer is shown; a refusal, and a machine without sbatch, are errors that say what to do."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(LaunchError, match="the script is in"):
        submit("script", tmp_path / "out")
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        '#!/bin/sh\ncat "$1"; echo "invalid partition" >&2; exit $(test -e refuse; echo $((1-$?)))\n'
    )
    sbatch.chmod(0o755)

    assert "script" == submit("script", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "refuse").touch()
    with pytest.raises(LaunchError, match="invalid partition"):
        submit("script", tmp_path / "out")
