"""Batch scripts for Slurm: SGLang on the nodes of a job, and a run that asks them from the first node.

    job = SlurmJob(out=Path("runs/first"), model="Qwen/Qwen3-8B", nodes=2)
    script = render(job)
    submit(script, job.folder)

Sources: sbatch(1), srun(1), and what has gone wrong elsewhere: a rank that the batch shell expanded, and a
port that was taken for a ready server (sglang#36116). So each task expands its own rank, and the fleet
probes the servers.
"""

import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2

from streamsyn.errors import ConfigError, LaunchError

_REQUEUE_MARGIN_S = 60
"""Seconds for the run to write its end and for the job to be queued again, after its requests have ended."""
_START_S = 1800
"""Seconds that the servers may take to load their weights before the run gives up."""
_PORTS = range(1024, 65_000)


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """A job of nodes with the same number of GPUs.

    Attributes:
        out: Run directory, on storage that all nodes share.
        model: Model that SGLang loads: a directory, or a name on the Hugging Face hub.
        nodes: Number of nodes.
        config: Configuration of the run.
        settings: Further `KEY=VALUE` of the run.
        seeds: Sources of seeds, in place of those of the configuration.
        gpus_per_node: GPUs of a node.
        gpus_per_replica: GPUs of a server, its tensor parallel size; it spans nodes if a node has fewer.
        port: Port of the first server of a node; the others follow.
        time: Time limit, as sbatch takes it.
        partition, account, qos: As sbatch takes them.
        sbatch_args: Further options of sbatch.
        sglang_python: Python interpreter with SGLang, on the nodes.
        sglang_args: Further flags of the servers.
        streamsyn: Command of streamsyn, on the nodes.
        drain_timeout_s: Seconds that requests in flight may take to finish.

    Raises:
        ConfigError: The numbers do not fit each other.
    """

    out: Path
    model: str
    nodes: int
    config: Path | None = None
    settings: tuple[str, ...] = ()
    seeds: tuple[str, ...] = ()
    gpus_per_node: int = 8
    gpus_per_replica: int = 1
    port: int = 30_000
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    sbatch_args: tuple[str, ...] = ()
    sglang_python: str = "python"
    sglang_args: tuple[str, ...] = ()
    streamsyn: str = "streamsyn"
    drain_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        larger, smaller = sorted((self.gpus_per_replica, self.gpus_per_node), reverse=True)
        if larger % smaller:
            raise ConfigError(
                f"--gpus-per-replica {self.gpus_per_replica}: a node has {self.gpus_per_node} GPUs; "
                "give a divisor or a multiple of that"
            )
        if self.nodes % self.nodes_per_replica:
            raise ConfigError(
                f"--nodes {self.nodes}: a replica of {self.gpus_per_replica} GPUs spans "
                f"{self.nodes_per_replica} nodes; give a multiple of that"
            )
        if self.port not in _PORTS:
            raise ConfigError(f"--port {self.port}: expected {_PORTS.start} to {_PORTS.stop - 1}")
        for option in self.sbatch_args:
            if "\n" in option or not option.startswith("-"):
                raise ConfigError(f"--sbatch-arg {option!r}: expected an option of sbatch, such as --mem=0")

    @property
    def folder(self) -> Path:
        """Where the script, the list of servers and the logs are: beside the run directory."""
        return self.out.with_name(f"{self.out.name}-slurm")

    @property
    def nodes_per_replica(self) -> int:
        """Nodes that one server spans."""
        return max(1, self.gpus_per_replica // self.gpus_per_node)

    @property
    def replicas_per_node(self) -> int:
        """Servers on a node; 1 where a server spans several."""
        return max(1, self.gpus_per_node // self.gpus_per_replica)

    def directives(self) -> Iterator[str]:
        """Yield the options of sbatch."""
        notice_s = round(self.drain_timeout_s) + _REQUEUE_MARGIN_S
        yield "--job-name=streamsyn"
        yield f"--nodes={self.nodes}"
        yield "--ntasks-per-node=1"
        yield f"--gpus-per-node={self.gpus_per_node}"
        yield "--exclusive"
        yield f"--time={self.time}"
        yield f"--output={shlex.quote(str(self.folder / 'job-%j.log'))}"
        yield "--open-mode=append"
        # B: to the batch shell, which hands it on; the servers go on until the run has ended.
        yield f"--signal=B:USR1@{notice_s}"
        yield "--requeue"
        for name in ("partition", "account", "qos"):
            if (value := getattr(self, name)) is not None:
                yield f"--{name}={shlex.quote(value)}"
        yield from self.sbatch_args

    def run(self) -> Iterator[str]:
        """Yield the words of the run's command, but for its servers."""
        yield from (self.streamsyn, "run")
        if self.config is not None:
            yield str(self.config)
        for source in self.seeds:
            yield from ("--seeds", source)
        yield from ("--out", str(self.out), "--log-json", "--set", f"fleet.give_up_s={_START_S}")
        yield from ("--set", "fleet.servers=[]")  # those of the job alone
        for setting in self.settings:
            yield from ("--set", setting)

    def flags(self) -> Iterator[str]:
        """Yield the flags of each server, but for host, port and rank."""
        yield from ("--model-path", self.model, "--tp-size", str(self.gpus_per_replica))
        yield from ("--nnodes", str(self.nodes_per_replica))
        yield from ("--enable-cache-report", "--enable-metrics")
        yield from self.sglang_args


def render(job: SlurmJob) -> str:
    """Return the batch script of a job."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",  # {# is the length of an array
        autoescape=False,  # noqa: S701 - the output is a shell script, and its words are quoted for the shell
    )
    environment.filters["quote"] = lambda word: shlex.quote(str(word))
    source = (files("streamsyn") / "data" / "slurm" / "job.sh.j2").read_text("utf-8")
    return environment.from_string(source).render(
        nodes=job.nodes,
        directives=list(job.directives()),
        folder=job.folder,
        sglang=job.sglang_python,
        flags=list(job.flags()),
        nodes_per_replica=job.nodes_per_replica,
        replicas_per_node=job.replicas_per_node,
        gpus_per_node=job.gpus_per_node,
        gpus_per_replica=job.gpus_per_replica,
        port=job.port,
        run=list(job.run()),
    )


def submit(script: str, folder: Path) -> str:
    """Write a script to `folder`/job.sh, hand it to sbatch, and return what sbatch answers.

    Raises:
        ConfigError: It cannot be written.
        LaunchError: There is no sbatch, or it refuses the job.
    """
    path = folder / "job.sh"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(script, "utf-8")
    except OSError as error:
        raise ConfigError(f"--out: cannot write {path}: {error.strerror}") from error
    try:
        done = subprocess.run(  # noqa: S603 - the user's own script
            ["sbatch", str(path)],  # noqa: S607 - the one on PATH, as in a shell
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise LaunchError(f"sbatch was not found; the script is in {path}") from None
    if done.returncode:
        raise LaunchError(f"sbatch refused {path}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip()
