"""`streamsyn train`. Nothing heavy is imported before the command line is known to be complete."""

import os
import signal
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamsyn.cli.exits import on_signals
from streamsyn.cli.options import Size
from streamsyn.errors import ConfigError, StreamsynError, TrainingFailed

if TYPE_CHECKING:
    from streamsyn.trainer.training_request import TrainRequest

_EXAMPLES = """\b
Examples:
  streamsyn train --from runs/first --model models/base --out tuned/first
  streamsyn run run.toml --out runs/first --stdout | streamsyn train train.toml --from -
  streamsyn train train.toml --from runs/first --out tuned/first --ray --workers 8
"""


@click.command(epilog=_EXAMPLES)
@click.argument("config", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--from",
    "source",
    metavar="DIR|-|URL",
    help="Run directory, or URL of a run at a daemon, live or finished; chat rows; an export; - for stdin.",
)
@click.option(
    "--model", metavar="PATH", help="Model to tune: a Hugging Face directory. Default: train.model."
)
@click.option(
    "--out", metavar="PATH", help="Directory of the training; an existing one is resumed. Default: train.out."
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a configuration key. Repeatable."
)
@click.option(
    "--plot", is_flag=True, help="Draw OUT/training.png at the end; without --from, draw it and exit."
)
@click.option("--plan", is_flag=True, help="Print how much memory the training needs on each GPU, and exit.")
@click.option(
    "--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="For --plan: GPUs (FSDP2)."
)
@click.option(
    "--gpu-memory", type=Size(), metavar="SIZE", help="For --plan: memory of one, such as 80GB or 79GiB."
)
@click.option("--json", "as_json", is_flag=True, help="For --plan: print one JSON object.")
@click.option("--wait", is_flag=True, help="Wait for the run of --from, if its directory does not exist yet.")
@click.option("--log-json", is_flag=True, help="Write only JSON objects to stderr, one per line.")
@click.option(
    "--ray",
    is_flag=False,
    flag_value="auto",
    metavar="[ADDRESS]",
    help="Train on the workers of this Ray cluster; without ADDRESS, of the one here.",
)
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="For --ray: number of workers.")
@click.option(
    "--gpus-per-worker", type=click.IntRange(min=0), metavar="G", help="For --ray: GPUs of each; 0 for none."
)
@click.option("--tethered", is_flag=True, hidden=True)  # set by `run --train`: see streamsyn.trainer.signals
def train(
    config: Path | None,
    source: str | None,
    model: str | None,
    out: str | None,
    settings: tuple[str, ...],
    plot: bool,
    plan: bool,
    gpus: int,
    gpu_memory: int | None,
    as_json: bool,
    wait: bool,
    log_json: bool,
    tethered: bool,
    **on_cluster: Any,
) -> None:
    """Tune a model on samples while they are written. The same command resumes a training.

    Starts as soon as there are samples for a step, waits when there are none, and ends when the stream ends.
    OUT/model is then a directory that from_pretrained and SGLang load. A signal finishes the step, saves and
    exits with 75.
    """
    from streamsyn.sink.rundir import wait_until_free
    from streamsyn.telemetry import configure_logs
    from streamsyn.trainer.signals import ParentLiveness
    from streamsyn.trainer.sources.locate import is_run
    from streamsyn.trainer.training_request import check, resolve

    configure_logs(as_json=log_json)
    if out is not None and not out:  # Path("") would be the working directory
        raise ConfigError("--out: the path is empty; give the directory of the training")
    folder = None if out is None else Path(out)
    if plan:
        _plan(config, model, settings, gpus, gpu_memory, as_json=as_json)
        return
    if source is None:
        _draw_only(config, folder, settings, wanted=plot)
        return
    parent = ParentLiveness.of_this_rank(wanted=tethered)
    try:
        request = resolve(config, source, model, folder, settings)
        request = request.on_cluster(**on_cluster)
        check(request)
        if not (wait or source == "-" or Path(source).exists()) and is_run(source, request.out):
            raise ConfigError(f"--from {source}: there is no such directory; pass --wait to wait for its run")
        _check_plot(wanted=plot)
        if parent is not None:
            wait_until_free(request.out, partial(_log_waiting, request.out))
        code = _train(request, as_json=log_json, on_cluster=on_cluster["ray"] is not None)
        on_signals(signal.SIG_IGN)  # nothing is left to stop
        if plot and os.environ.get("RANK", "0") == "0":
            _plot(request.out)
    except (ConfigError, TrainingFailed) as error:  # a restart would end the same way
        if parent is not None:
            parent.send_exit_code(2 if isinstance(error, ConfigError) else 1)
        raise
    if parent is not None:
        parent.send_exit_code(code)
    _exit(code)


def _train(request: "TrainRequest", *, as_json: bool, on_cluster: bool) -> int:
    """Train here, as one rank of those that a launcher has started, or on a cluster; return the exit code."""
    if on_cluster:
        from streamsyn.trainer.on_cluster import train_on_cluster

        return train_on_cluster(request, as_json=as_json)
    from streamsyn.trainer.training import train as run_training

    return run_training(request.config, request.source, request.model, request.out)


def _plan(
    config: Path | None,
    model: str | None,
    settings: tuple[str, ...],
    gpus: int,
    gpu_memory: int | None,
    *,
    as_json: bool,
) -> None:
    """Print the memory of the training as a table, or as JSON."""
    from streamsyn.config.loading import load, parse_override
    from streamsyn.trainer.training_request import check_packages

    section = load(config, map(parse_override, settings)).train
    path = model or section.model
    if path is None:
        raise ConfigError("the model to tune is missing: pass --model PATH, or set train.model")
    check_packages(section)
    from streamsyn.trainer.memory_plan import memory_plan, plan_json, print_plan

    needs = memory_plan(path, section, gpus)
    if as_json:
        click.echo(plan_json(path, section, gpus, gpu_memory, needs))
    else:
        print_plan(path, section, gpus, gpu_memory, needs)


def _draw_only(config: Path | None, out: Path | None, settings: tuple[str, ...], *, wanted: bool) -> None:
    """Draw a training without continuing it, as `--plot` without `--from` asks for."""
    if not wanted:
        raise ConfigError("--from is missing: expected a run directory, a file of chat rows, or - for stdin")
    from streamsyn.trainer.metrics.plot import draw

    click.echo(draw(_existing_out(config, out, settings)))


def _check_plot(*, wanted: bool) -> None:
    """Find out now rather than after a week of training that nothing can be drawn."""
    if wanted and find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'streamsyn[train]'")


def _exit(code: int) -> None:
    """Exit at once: everything is synced, and shutting down torch takes seconds."""
    if sys.stdout is not None:  # None if stdout was closed before Python started
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _log_waiting(out: Path, holder: str) -> None:
    """Log that an earlier trainer, whose run was killed, may still be saving in OUT."""
    import structlog

    structlog.get_logger().warning(
        "train.waits", out=str(out), why=f"it is in use by another process ({holder})"
    )


def _existing_out(config: Path | None, out: Path | None, settings: tuple[str, ...]) -> Path:
    """OUT of the training to draw."""
    from streamsyn.config.loading import load, parse_override

    if out is None:
        named = load(config, map(parse_override, settings)).train.out
        if named is None:
            raise ConfigError("no training to plot: pass --out DIR, or set train.out")
        out = Path(named)
    return out


def _plot(out: Path) -> None:
    """Draw the finished training. A failure is logged: it does not fail the training."""
    import structlog

    from streamsyn.trainer.metrics.plot import draw

    log = structlog.get_logger()
    try:
        log.info("train.plot", path=str(draw(out)))
    except StreamsynError as error:
        log.warning("train.plot", why=str(error))
