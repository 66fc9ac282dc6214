"""`streamsyn retry`: ask the rejects of a run again."""

import difflib
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamsyn.cli.exits import EXIT_STOPPED, on_signals
from streamsyn.cli.options import LAUNCH, LOG_JSON, NO_PROGRESS, SERVER, SETTINGS, examples, resolve
from streamsyn.cli.run import judge_rejects, summarise
from streamsyn.errors import ConfigError

if TYPE_CHECKING:
    from streamsyn.records import RejectReason


def _reasons(_: click.Context, __: click.Parameter, given: Sequence[str]) -> "list[RejectReason]":
    """Return the reasons of the closed set; for a name that is not one, the nearest is suggested."""
    from streamsyn.records import RejectReason

    known = [str(reason) for reason in RejectReason]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the reasons are {', '.join(known)}"
            raise click.BadParameter(f"{name!r} is not a reason of rejection; {hint}")
    return [RejectReason(name) for name in given]


@click.command(
    epilog=examples(
        "streamsyn retry runs/first",
        "streamsyn retry runs/first --reason timeout --reason server_unavailable",
        "streamsyn retry runs/first --reason too_short --set checks.min_words=30",
    )
)
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option(
    "--reason",
    "reasons",
    multiple=True,
    callback=_reasons,
    metavar="REASON",
    help="Only rejects of this reason. Repeatable.  [default: all]",
)
@SERVER
@SETTINGS
@NO_PROGRESS
@LOG_JSON
@LAUNCH[0]
@LAUNCH[1]
@LAUNCH[2]
def retry(directory: Path, reasons: Sequence["RejectReason"], **given: Any) -> None:
    """Ask the rejects of a run again, with the settings of the run or with changed ones.

    A reject holds until its seed has a new outcome. Settings that other rows depend on (assembly, the seed of
    the run) cannot be changed. Stopped early, `streamsyn run --out DIRECTORY` goes on with it.
    """
    from streamsyn.pipeline.reopened import without_missing_sources
    from streamsyn.pipeline.request import RunRequest
    from streamsyn.pipeline.run import run as run_pipeline
    from streamsyn.records import RejectReason
    from streamsyn.sink.retries import holding_rejects
    from streamsyn.sink.rundir import read_run_json
    from streamsyn.sink.snapshot import Snapshot
    from streamsyn.telemetry import configure_logs

    configure_logs(as_json=given["log_json"])
    if read_run_json(directory) is None:
        raise ConfigError(f"{directory} is not a run directory: it has no run.json")
    config = resolve(given, directory)
    if given["launch"] and given["server"]:
        raise ConfigError("--launch and --server cannot be combined: --launch starts its own server")
    asked = reasons or tuple(RejectReason)
    snapshot = Snapshot(directory)
    found = Counter(str(row["reason"]) for row in holding_rejects(snapshot) if row["reason"] in asked)
    if not found and not snapshot.manifest.open_retries:
        only = f" of reason {', '.join(asked)}" if reasons else ""
        click.echo(f"{directory} has no rejects{only}: nothing to retry", err=True)
        return
    by_reason = ", ".join(f"{reason} {number:,}" for reason, number in found.most_common())
    click.echo(f"retrying {found.total():,} rejects: {by_reason}", err=True)
    if snapshot.manifest.seeds_read:
        config = without_missing_sources(config)
    request = RunRequest(
        config=config,
        out=directory,
        launch=given["launch"],
        launch_python=given["sglang_python"],
        launch_args=given["sglang_arg"],
        show_progress=not (given["no_progress"] or given["log_json"]),
        retry=asked,
    )
    try:
        summary = run_pipeline(request)
    finally:
        on_signals(signal.SIG_IGN)  # the outcome is final: nothing is left to stop
    summarise(summary, as_json=given["log_json"])
    if summary.stopped:
        sys.exit(EXIT_STOPPED)
    judge_rejects(summary, config.run.max_reject_fraction)
