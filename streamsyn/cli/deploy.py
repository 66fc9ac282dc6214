"""`streamsyn deploy`: what starts streamsyn and its servers on a cluster."""

from pathlib import Path

import click

from streamsyn.cli.options import SETTINGS, examples


@click.group(
    epilog=examples(
        "streamsyn deploy slurm run.toml --nodes 2 --model Qwen/Qwen3-8B --out runs/first --dry-run",
        "streamsyn deploy slurm --help",
    )
)
def deploy() -> None:
    """Start streamsyn and its servers on a cluster."""


@deploy.command(
    epilog=examples(
        "streamsyn deploy slurm run.toml --nodes 2 --model Qwen/Qwen3-8B --out runs/first --dry-run",
        "streamsyn deploy slurm run.toml --nodes 4 --model /models/70B --gpus-per-replica 16 --out runs/b",
    )
)
@click.argument("config", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Run directory.")
@click.option("--model", required=True, metavar="MODEL", help="Model for SGLang: a directory or a name.")
@click.option("--nodes", type=click.IntRange(min=1), required=True, metavar="N", help="Number of nodes.")
@click.option(
    "--gpus-per-node", type=click.IntRange(min=1), default=8, show_default=True, help="GPUs of a node."
)
@click.option(
    "--gpus-per-replica",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="GPUs of a server; more than a node has: the server spans nodes.",
)
@click.option("--seeds", multiple=True, metavar="PATH", help="Seeds, as for run. Repeatable.")
@SETTINGS
@click.option("--time", default="24:00:00", show_default=True, metavar="LIMIT", help="Time limit of the job.")
@click.option("--partition", metavar="NAME", help="Partition.")
@click.option("--account", metavar="NAME", help="Account.")
@click.option("--qos", metavar="NAME", help="Quality of service.")
@click.option("--sbatch-arg", multiple=True, metavar="OPTION", help="Further option of sbatch. Repeatable.")
@click.option(
    "--sglang-python", default="python", show_default=True, metavar="PATH", help="Python with sglang."
)
@click.option("--sglang-arg", multiple=True, metavar="FLAG", help="Further flag of the servers. Repeatable.")
@click.option("--streamsyn", default="streamsyn", show_default=True, metavar="PATH", help="Command to run.")
@click.option("--port", type=int, default=30_000, show_default=True, help="Port of a node's first server.")
@click.option("--dry-run", is_flag=True, help="Print the script; submit nothing.")
def slurm(
    config: Path | None,
    out: Path,
    model: str,
    nodes: int,
    gpus_per_node: int,
    gpus_per_replica: int,
    seeds: tuple[str, ...],
    settings: tuple[str, ...],
    time: str,
    partition: str | None,
    account: str | None,
    qos: str | None,
    sbatch_arg: tuple[str, ...],
    sglang_python: str,
    sglang_arg: tuple[str, ...],
    streamsyn: str,
    port: int,
    *,
    dry_run: bool,
) -> None:
    """Submit a Slurm job: SGLang on its nodes, and a run that asks them.

    Before the time limit, and when the job is preempted, the run finishes what is in flight and the job is
    queued again; it resumes in the same --out, which must be on storage that all nodes share. The script, the
    list of servers and the logs are in OUT-slurm.
    """
    from streamsyn.config.loading import load, parse_override
    from streamsyn.slurm import SlurmJob, render, submit

    loaded = load(config, map(parse_override, settings))
    job = SlurmJob(
        out=out.absolute(),
        model=model,
        nodes=nodes,
        config=None if config is None else config.absolute(),
        settings=settings,
        seeds=seeds,
        gpus_per_node=gpus_per_node,
        gpus_per_replica=gpus_per_replica,
        port=port,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        sbatch_args=sbatch_arg,
        sglang_python=sglang_python,
        sglang_args=sglang_arg,
        streamsyn=streamsyn,
        drain_timeout_s=loaded.run.drain_timeout_s,
    )
    script = render(job)
    click.echo(script if dry_run else submit(script, job.folder), nl=not dry_run)
