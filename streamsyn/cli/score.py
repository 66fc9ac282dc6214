"""`streamsyn score`: measure the contexts of a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamsyn.cli.options import LOG_JSON, SERVER, SETTINGS, examples, resolve
from streamsyn.cluster import joined
from streamsyn.errors import ConfigError
from streamsyn.plain_text import visible

if TYPE_CHECKING:
    from streamsyn.scoring.score_log import Examine, ScoreSummary


@click.command(
    epilog=examples(
        "streamsyn score runs/first --server http://gpu-1:30000",
        "streamsyn score runs/first --only leaks --ray --set 'checks.eval_sets=[\"eval.jsonl\"]'",
        "streamsyn score runs/first --only gain --set scoring.model=judge --again",
    )
)
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option(
    "--only",
    "measures",
    multiple=True,
    type=click.Choice(["gain", "answers", "duplicates", "leaks"]),
    help="Measure only this. Repeatable.  [default: all]",
)
@click.option(
    "--ray",
    is_flag=False,
    flag_value="auto",
    metavar="[ADDRESS]",
    help="Have the nodes of this Ray cluster compare the texts; without ADDRESS, of the one here.",
)
@click.option("--again", is_flag=True, help="Measure anew what was measured with other settings.")
@SERVER
@SETTINGS
@LOG_JSON
def score(directory: Path, measures: tuple[Any, ...], *, ray: str | None, again: bool, **given: Any) -> None:
    """Measure the contexts of a run: context gain, answers, near-duplicates, leaks of evaluation data.

    The run may be finished or still going on. The findings go to DIRECTORY/scores; `report` and `export` read
    them as if the run had measured its contexts itself. What is measured is skipped, so a `score` that was
    stopped goes on. Partitions are measured one after the other, each on its own: near-duplicates are found
    within a partition.
    """
    from streamsyn.scoring.score_log import ScoreRequest
    from streamsyn.scoring.score_log import score as score_contexts
    from streamsyn.scoring.sidecar import MEASURES
    from streamsyn.sink.partitions import begun_directories
    from streamsyn.sink.rundir import read_run_json
    from streamsyn.telemetry import configure_logs

    configure_logs(as_json=given["log_json"])
    directories = begun_directories(directory)
    for one in directories:
        if read_run_json(one) is None:
            raise ConfigError(f"{one} is not a run directory: it has no run.json")
    if given["server"]:
        given["settings"] = (*given["settings"], "scoring.servers=[]")
    with joined(ray):
        examine: Examine | None = None
        if ray is not None:
            from streamsyn.cluster.spread import examine_shards

            examine = examine_shards
        for one in directories:
            request = ScoreRequest(
                root=one,
                config=resolve(given, one),
                measures=measures or MEASURES,
                again=again,
                examine=examine,
            )
            _summarise(one, score_contexts(request), as_json=given["log_json"])


def _summarise(directory: Path, summary: "ScoreSummary", *, as_json: bool) -> None:
    """Print what was measured, or log it as score.done."""
    import structlog

    from streamsyn.scoring.sidecar import measured

    total = measured(directory)
    if as_json:
        structlog.get_logger().info(
            "score.done",
            contexts=summary.contexts,
            measured=dict(summary.measured),
            total=dict(total),
            skipped=summary.skipped,
            unscored=summary.counters.unscored,
            is_final=summary.is_final,
        )
        return
    click.echo(f"{directory}: {summary.contexts:,} contexts", err=True)
    for measure, number in total.items():
        click.echo(f"  {measure:10} {summary.measured[measure]:,} measured now, {number:,} in all", err=True)
    for reason in summary.skipped:
        click.echo(f"  skipped    {visible(reason)}", err=True)
    if unscored := summary.counters.unscored:
        click.echo(f"  failed     {unscored:,} measurements; run again to repeat them", err=True)
    if not summary.is_final:
        click.echo("  the run is not finished: run again for the contexts that follow", err=True)
    click.echo(f"  see them   streamsyn report {directory}", err=True)
