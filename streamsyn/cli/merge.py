"""`streamsyn merge`: finished runs of several sites become one."""

from collections.abc import Sequence
from pathlib import Path

import click

from streamsyn.cli.options import LOG_JSON, examples
from streamsyn.plain_text import visible


@click.command(
    epilog=examples(
        "streamsyn merge runs/first runs/second --to runs/all",
        "streamsyn merge runs/first --to runs/one",
    )
)
@click.argument(
    "directories", nargs=-1, required=True, type=click.Path(path_type=Path, file_okay=False, exists=True)
)
@click.option(
    "--to",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Run directory to write; new.",
)
@LOG_JSON
def merge(directories: Sequence[Path], *, to: Path, log_json: bool) -> None:
    """Merge finished runs into one run directory. What shapes outputs must be the same in all of them.

    Of a seed that several runs have, the outcome of the run named first is taken. Samples are made anew, with
    distractors of all runs. A merge that was killed is repeated by the same command.
    """
    import structlog

    from streamsyn.pipeline.merge import merge as merge_runs
    from streamsyn.telemetry import configure_logs

    configure_logs(as_json=log_json)
    done = merge_runs(directories, to)
    if log_json:
        structlog.get_logger().info(
            "merge.done", to=str(to), runs=done.runs, left_out=done.left_out, **done.counts
        )
        return
    counts = ", ".join(f"{number:,} {kind}" for kind, number in done.counts.items())
    click.echo(visible(f"{to}: {counts} of {done.runs} runs"))
    if done.left_out:
        click.echo(f"  left out   {done.left_out:,} outcomes of seeds that a run named before has, too")
