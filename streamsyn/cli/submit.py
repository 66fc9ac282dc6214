"""`streamsyn submit`: a run on a Ray cluster, which survives the loss of its node."""

import asyncio
import os
import sys

import click

from streamsyn.cli.options import LOG_JSON, examples, resolve
from streamsyn.cli.run import run
from streamsyn.cluster import needing_ray
from streamsyn.errors import ConfigError


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=examples(
        "streamsyn submit -- run run.toml --out /shared/runs/first",
        "streamsyn submit --ray head:6379 -- run --seeds /shared/pairs.jsonl --ray --model M --out /shared/b",
        "ray job submit -- streamsyn submit -- run run.toml --out /shared/runs/first",
    ),
)
@click.option(
    "--ray",
    "address",
    default="auto",
    metavar="ADDRESS",
    help="HOST:PORT of the cluster.  [default: the one of this machine or job]",
)
@LOG_JSON
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="run ...")
def submit(address: str, command: tuple[str, ...], log_json: bool) -> None:
    """Start `streamsyn run` on a node of a Ray cluster, and again on another when it dies.

    What the run prints goes to stderr here, and its exit code is passed on. --out has to be on storage that
    all nodes share, or the run to have a mirror (sink.mirror), from which it goes on. A signal to this
    command, or `ray job stop`, stops the run as it would there: it drains.
    """
    from streamsyn.telemetry import configure_logs

    if command[:1] != ("run",):
        raise click.UsageError("only a run can be submitted: streamsyn submit -- run --out DIRECTORY ...")
    arguments = command[1:]
    given = run.make_context("streamsyn submit -- run", list(arguments)).params
    if given["to_stdout"] or "-" in given["seeds"]:
        raise ConfigError(
            "a run that is submitted has no stdin and no stdout: leave out --seeds - and --stdout"
        )
    configure_logs(as_json=log_json)
    with needing_ray("streamsyn submit"):
        from streamsyn.cluster.coordinator import command_of
        from streamsyn.cluster.submitted import submitted
    more = ("--log-json",) if log_json and not given["log_json"] else ()
    out = given["out"].absolute()
    is_mirrored = given["partitions"] is None and bool(resolve(given, None).sink.mirror)
    submission = command_of(
        (*arguments, *more, "--no-progress", "--out", str(out)), out, is_mirrored=is_mirrored
    )
    sys.exit(asyncio.run(submitted(submission, address, _to_stderr)))


def _to_stderr(data: bytes) -> None:
    sys.stderr.flush()
    os.write(2, data)
