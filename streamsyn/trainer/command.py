"""`streamsyn train`: the command line. Nothing heavy is imported before it is clear that it is there."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from streamsyn.errors import ConfigError

_NEEDED = ("torch", "transformers", "accelerate")


@click.command()
@click.argument("config", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--from",
    "source",
    required=True,
    metavar="DIR|-",
    help="Run directory to follow, live or finished; a file of chat rows; - for NDJSON on stdin.",
)
@click.option("--model", required=True, metavar="PATH", help="Model to tune: a Hugging Face directory.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Where checkpoints and the tuned model go; an existing one is resumed.",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key. Repeatable.")
@click.option("--log-json", is_flag=True, help="One JSON object a line on stderr, and nothing else.")
def train(
    config: Path | None, source: str, model: str, out: Path, settings: tuple[str, ...], log_json: bool
) -> None:
    """Tune a model on samples as they are written. Resumes where an earlier training left off.

    Starts as soon as there are samples for a step, waits when there are none, and ends when the stream
    ends: OUT/model is then a directory that from_pretrained and SGLang load. A signal finishes the step,
    saves and exits with 75. Run it under `accelerate launch -m streamsyn train ...` on several GPUs.
    """
    from streamsyn.telemetry import configure_logs

    configure_logs(as_json=log_json)
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f"training needs {', '.join(missing)}: pip install 'streamsyn[train]'")
    resolved = _resolve(config, out, settings)
    _check_source(source, out)
    from streamsyn.trainer.training import train as run_training

    sys.exit(run_training(resolved, source, model, out))


def _resolve(config: Path | None, out: Path, settings: tuple[str, ...]) -> Any:
    """The configuration: the file, or what the directory was begun with; --set over it."""
    from streamsyn.config import load, parse_override
    from streamsyn.trainer.outdir import remembered

    overrides = remembered(out) if config is None else []
    return load(config, [*overrides, *map(parse_override, settings)])


def _check_source(source: str, out: Path) -> None:
    if "://" in source:
        raise ConfigError(f"--from {source}: following a daemon over HTTP is not there yet; give DIR or -")
    if source != "-" and Path(source).resolve() == out.resolve():
        raise ConfigError("--from and --out are the same directory")
