"""`streamsyn retry`: ask the rejects of a run again."""

import difflib
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamsyn.cli.exits import on_signals
from streamsyn.cli.options import LAUNCH, LOG_JSON, NO_PROGRESS, SERVER, SETTINGS, examples, request_of
from streamsyn.cli.run import exit_code_of, judge_rejects, summarise
from streamsyn.errors import ConfigError

if TYPE_CHECKING:
    from streamsyn.pipeline.summary import RunSummary
    from streamsyn.records import RejectReason
    from streamsyn.sink.manifest import Manifest
    from streamsyn.sink.partitions import Partitions


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
    the run) cannot be changed. A retry that stopped early is resumed by `streamsyn run --out DIRECTORY`.
    Partitions are retried one after the other.
    """
    from streamsyn.records import RejectReason
    from streamsyn.sink.partitions import read_partitions
    from streamsyn.telemetry import configure_logs

    configure_logs(as_json=given["log_json"])
    asked = reasons or tuple(RejectReason)
    partitions = read_partitions(directory)
    if partitions is None:
        if (summary := _retry(directory, asked, given)) is not None:
            on_signals(signal.SIG_IGN)  # the outcome is final: nothing is left to stop
            judge_rejects(*summary)
        return
    _retry_partitions(partitions, asked, given)


def _retry_partitions(
    partitions: "Partitions", asked: Sequence["RejectReason"], given: dict[str, Any]
) -> None:
    """Retry in all partitions, one after the other. Rejects are judged over all of them."""
    from streamsyn.pipeline.status import status
    from streamsyn.pipeline.summary import RunSummary
    from streamsyn.sink.rundir import DirectoryLock
    from streamsyn.telemetry import Counters

    out, allowed = partitions.root, 1.0
    lock = DirectoryLock(out)
    try:
        if not partitions.has_ended:
            raise ConfigError(
                f"not all partitions of {out} have ended; run `streamsyn run --out {out}` first"
            )
        partitions = partitions.with_next_round()
        for at, directory in enumerate(partitions.directories):
            if (done := _retry(directory, asked, given)) is not None:
                allowed = done[1]
            partitions = partitions.with_ended(at)
    finally:
        lock.close()
    on_signals(signal.SIG_IGN)  # the outcome is final: nothing is left to stop
    found = status(out)
    judge_rejects(RunSummary(out, Counters(), contexts=found.contexts, rejects=found.rejects), allowed)


def _retry(
    directory: Path, asked: Sequence["RejectReason"], given: dict[str, Any]
) -> "tuple[RunSummary, float] | None":
    """Retry in one run directory; exit if it stops early.

    Returns:
        Its summary, and the `run.max_reject_fraction` to judge it by; None if there was nothing to do.
    """
    from streamsyn.library.run_thread import run_to_end
    from streamsyn.pipeline.reopened import without_missing_sources
    from streamsyn.sink.rundir import read_run_json

    if read_run_json(directory) is None:
        raise ConfigError(f"{directory} is not a run directory: it has no run.json")
    request = request_of(given, directory, retry=asked)
    if given["launch"] and given["server"]:
        raise ConfigError("--launch and --server cannot be combined: --launch starts its own server")
    manifest = _announce(directory, asked, as_json=given["log_json"])
    if manifest is None:
        return None
    if manifest.seeds_read:
        request.config = without_missing_sources(request.config)
    summary = run_to_end(request)
    summarise(summary, as_json=given["log_json"])
    if summary.stopped:
        on_signals(signal.SIG_IGN)  # the outcome is final: nothing is left to stop
        sys.exit(exit_code_of(summary))
    _report_left(directory, as_json=given["log_json"])
    return summary, request.config.run.max_reject_fraction


def _announce(directory: Path, asked: "Sequence[RejectReason]", *, as_json: bool) -> "Manifest | None":
    """Print how many rejects are asked again; return the manifest, or None if there is nothing to do."""
    from streamsyn.sink.snapshot import Snapshot, holding_rejects

    snapshot = Snapshot(directory)
    found = Counter(str(row["reason"]) for row in holding_rejects(snapshot) if row["reason"] in asked)
    by_reason = ", ".join(f"{reason} {number:,}" for reason, number in found.most_common())
    is_idle = not found and not snapshot.manifest.open_retries
    text = f"retrying {found.total():,} rejects: {by_reason}" if found else "going on with the retry before"
    if is_idle:
        text = f"{directory} has no rejects of these reasons ({', '.join(asked)}): nothing to retry"
    _say(text, "retry.idle" if is_idle else "retry.started", dict(found), as_json=as_json)
    return None if is_idle else snapshot.manifest


def _report_left(directory: Path, *, as_json: bool) -> None:
    """Print how many rejects could not be asked again."""
    from streamsyn.sink.snapshot import Snapshot, holding_rejects

    snapshot = Snapshot(directory)
    retry = snapshot.manifest.retries[-1]
    left = Counter(str(row["reason"]) for row in holding_rejects(snapshot) if retry.reopens(row))
    if left:
        text = (
            f"  not asked  {left.total():,} rejects: their lines still cannot be read, or the file is gone, "
            "or their seed has an outcome by now"
        )
        _say(text, "retry.left", dict(left), as_json=as_json)


def _say(text: str, event: str, rejects: dict[str, int], *, as_json: bool) -> None:
    """Print a text, or log an event with the numbers of rejects by reason."""
    import structlog

    if as_json:
        structlog.get_logger().info(event, rejects=rejects)
    else:
        click.echo(text, err=True)
