"""`streamsyn train`: the command line. Nothing heavy is imported before it is clear that it is there."""

import os
import signal
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import click

from streamsyn.errors import ConfigError, StreamsynError, TrainingFailed


@click.command()
@click.argument("config", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--from",
    "source",
    metavar="DIR|-",
    help="Run directory to follow, live or finished; files of chat rows, or an export, of which `train` is "
    "read; - for NDJSON on stdin.",
)
@click.option("--model", metavar="PATH", help="Model to tune: a Hugging Face directory.")
@click.option(
    "--out",
    metavar="PATH",
    help="Where checkpoints and the tuned model go; an existing one is resumed.",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key. Repeatable.")
@click.option("--plot", is_flag=True, help="Draw OUT/training.png at the end; without --from, do only that.")
@click.option("--log-json", is_flag=True, help="One JSON object a line on stderr, and nothing else.")
@click.option("--tethered", is_flag=True, hidden=True)  # by `run --train`: see streamsyn.trainer.signals
def train(
    config: Path | None,
    source: str | None,
    model: str | None,
    out: str | None,
    settings: tuple[str, ...],
    plot: bool,
    log_json: bool,
    tethered: bool,
) -> None:
    """Tune a model on samples as they are written. Resumes where an earlier training left off.

    Starts as soon as there are samples for a step, waits when there are none, and ends when the stream
    ends: OUT/model is then a directory that from_pretrained and SGLang load. A signal finishes the step,
    saves and exits with 75. Run it under `accelerate launch -m streamsyn train ...` on several GPUs.
    Without --model and --out, the keys train.model and train.out say them.
    """
    from streamsyn.sink.rundir import wait_until_free
    from streamsyn.telemetry import configure_logs
    from streamsyn.trainer.signals import ParentLiveness
    from streamsyn.trainer.training_request import check, resolve

    configure_logs(as_json=log_json)
    if out is not None and not out:  # as a path it would be the folder one stands in
        raise ConfigError("--out: the path is empty; give the directory that the training is to have")
    folder = None if out is None else Path(out)
    if source is None:
        if not plot:
            raise ConfigError("there is nothing to train on: pass --from DIR, a file of chat rows, or -")
        from streamsyn.trainer.metrics.plot import draw

        click.echo(draw(_out_of(config, folder, settings)))
        return
    tether = ParentLiveness.of_this_rank(wanted=tethered)
    try:
        request = resolve(config, source, model, folder, settings)
        check(request)
        if plot and find_spec("matplotlib") is None:  # to be said now, not in a week
            raise ConfigError("--plot needs matplotlib: pip install 'streamsyn[train]'")
        if tether is not None:
            wait_until_free(request.out, partial(_say_waiting, request.out))
        from streamsyn.trainer.training import train as run_training

        code = run_training(request.config, request.source, request.model, request.out)
        for number in (signal.SIGTERM, signal.SIGINT):  # the outcome stands: there is nothing left to stop
            signal.signal(number, signal.SIG_IGN)
        if plot and os.environ.get("RANK", "0") == "0":
            _draw(request.out)
    except (ConfigError, TrainingFailed) as error:  # to start again would end the same
        if tether is not None:
            tether.say(2 if isinstance(error, ConfigError) else 1)
        raise
    if tether is not None:
        tether.say(code)
    _exit(code)


def _exit(code: int) -> None:
    """Leave at once: all that is to stay was synced, and to take torch apart takes seconds."""
    if sys.stdout is not None:  # Python found it closed
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say_waiting(out: Path, holder: str) -> None:
    """A trainer whose run was killed may still be saving there."""
    import structlog

    structlog.get_logger().warning(
        "train.waits", out=str(out), why=f"it is in use by another process ({holder})"
    )


def _out_of(config: Path | None, out: Path | None, settings: tuple[str, ...]) -> Path:
    """The directory of the training whose curve is to be drawn."""
    from streamsyn.config.loading import load, parse_override

    if out is None:
        named = load(config, map(parse_override, settings)).train.out
        if named is None:
            raise ConfigError("there is no training to draw: pass --out DIR, or set train.out")
        out = Path(named)
    return out


def _draw(out: Path) -> None:
    """Draw what was trained, if anything was; the training stands, whatever becomes of its picture."""
    import structlog

    from streamsyn.trainer.metrics.plot import draw

    log = structlog.get_logger()
    try:
        log.info("train.plot", path=str(draw(out)))
    except StreamsynError as error:
        log.warning("train.plot", why=str(error))
