"""`streamsyn run`: write contexts for seeds and assemble samples."""

import signal
import sys
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from streamsyn.cli.exits import EXIT_OTHER, EXIT_REJECTS, EXIT_STOPPED, EXIT_USAGE, fail, on_signals
from streamsyn.cli.options import examples, imports, request_of, run_options
from streamsyn.cli.partitioned_run import partitions_of, run_partitions
from streamsyn.errors import ConfigError
from streamsyn.plain_text import visible
from streamsyn.stop_signals import stop_with_parent

if TYPE_CHECKING:
    from streamsyn.pipeline.summary import RunSummary


@click.command(
    epilog=examples(
        "streamsyn run --seeds pairs.jsonl --server http://gpu-1:30000 --out runs/first",
        "streamsyn run run.toml --launch Qwen/Qwen3-8B --limit 100 --out runs/trial",
        "cat pairs.jsonl | streamsyn run --seeds - --server http://gpu-1:30000 --out runs/piped --stdout",
    )
)
@run_options
@click.option(
    "--partitions",
    type=click.IntRange(min=1, max=1000),
    metavar="N",
    help="Split the seeds over N coordinator processes, each with a run directory in --out.",
)
@click.option("--tethered", is_flag=True, hidden=True)  # a coordinator: it stops when its stdin ends
@click.option("--told-servers", is_flag=True, hidden=True)  # a coordinator: its stdin tells of its servers
def run(**given: Any) -> None:
    """Write contexts for seeds and assemble samples. An existing --out is resumed.

    With --train a model is tuned on the samples during the run. A signal stops both, the run first.
    """
    if (number := partitions_of(given)) is not None:
        run_partitions(given, number)
        return
    with imports():
        from streamsyn.library.run_thread import run_to_end
        from streamsyn.pipeline.stdout import SampleStream
        from streamsyn.telemetry import configure_logs

    configure_logs(as_json=given["log_json"])
    if given["tethered"]:
        stop_with_parent()
    request = request_of(given, given["out"], replay=given["replay"], preflight=not given["no_preflight"])
    request.take_over = given["take_over"]
    if given["told_servers"]:
        from streamsyn.fleet.told_servers import told_servers

        request.placed = partial(told_servers, sys.stdin)
    if given["launch"] and given["server"]:
        raise ConfigError("--launch and --server cannot be combined: --launch starts its own server")
    if given["launch"] and given["ray"]:
        raise ConfigError("--launch and --ray cannot be combined: each starts servers of its own")
    if given["replay"] and not given["to_stdout"]:
        raise ConfigError("--replay needs --stdout: it writes earlier samples to stdout again")
    training = None
    if given["train"]:
        from streamsyn.trainer.supervisor import training_beside

        training = training_beside(given["train"], given["out"], as_json=given["log_json"], ray=given["ray"])
    stream = SampleStream() if given["to_stdout"] else None
    request.stream, request.supervisor = stream, training
    with nullcontext() if training is None else training.beside():
        try:
            summary = run_to_end(request)
        finally:
            if training is None:
                on_signals(signal.SIG_IGN)  # the outcome is final: nothing is left to stop
            if stream is not None:
                stream.close()
        summarise(summary, as_json=given["log_json"])
        stopped = summary.stopped is not None or summary.interrupted
        trained = 0 if training is None else training.finish(stopped=stopped)
    on_signals(signal.SIG_IGN)
    if training is not None and trained == EXIT_USAGE:
        fail(f"the training cannot start or continue: {training.error}", EXIT_USAGE)
    if summary.stopped:
        sys.exit(exit_code_of(summary))
    if training is not None and trained == EXIT_OTHER:
        fail(f"the run finished, but its training failed: {training.error}", EXIT_OTHER)
    if trained:
        sys.exit(EXIT_STOPPED)
    judge_rejects(summary, request.config.run.max_reject_fraction)


def exit_code_of(summary: "RunSummary") -> int:
    """Return the exit code of a run that stopped early."""
    return EXIT_REJECTS if summary.too_many_rejects else EXIT_STOPPED


def judge_rejects(summary: "RunSummary", allowed: float) -> None:
    """Exit with EXIT_REJECTS if more than `allowed` of the outcomes are rejects."""
    from streamsyn.pipeline.summary import too_many_rejects

    text = too_many_rejects(summary, allowed)
    if text is not None:
        fail(text, EXIT_REJECTS, prefix="")


def summarise(summary: "RunSummary", *, as_json: bool) -> None:
    """Print the summary of a run, or log it as run.done."""
    import structlog

    from streamsyn.pipeline.summary import closing_lines

    if as_json:
        structlog.get_logger().info("run.done", **summary.as_dict())
        return
    for line in closing_lines(summary):
        click.echo(visible(line), err=True)
