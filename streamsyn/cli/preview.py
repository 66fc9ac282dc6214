"""`streamsyn preview`: print the prompts of the first seeds."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamsyn.cli.options import examples, resolve, run_options
from streamsyn.errors import ConfigError
from streamsyn.plain_text import visible

if TYPE_CHECKING:
    from streamsyn.config.loading import Config


@click.command(
    epilog=examples(
        "streamsyn preview --seeds pairs.jsonl",
        "streamsyn preview run.toml --limit 1 --set recipe.use=sections",
        "streamsyn preview run.toml --estimate --tokens-per-s 2500 --price-in 0.5 --price-out 1.5",
    )
)
@run_options
@click.option(
    "--estimate", is_flag=True, help="Print tokens, hours and price of the run in place of prompts."
)
@click.option(
    "--tokens-per-s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="With --estimate: output tokens per second of all servers together.",
)
@click.option(
    "--like",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="DIR",
    help="With --estimate: run directory whose tokens per draft and rate to take.",
)
@click.option(
    "--price-in",
    type=click.FloatRange(min=0),
    metavar="N",
    help="With --estimate: price of a million tokens in.",
)
@click.option(
    "--price-out",
    type=click.FloatRange(min=0),
    metavar="N",
    help="With --estimate: price of a million tokens out.",
)
def preview(**given: Any) -> None:
    """Print what would be sent for the first seeds (3, or --limit). Contacts no server, writes nothing.

    Takes the same options as `run`; those that do not shape prompts have no effect. With --estimate: what the
    run would take, with answers of the length that is asked for.
    """
    from streamsyn.telemetry import configure_logs

    configure_logs(as_json=given["log_json"], level=logging.WARNING if given["estimate"] else logging.INFO)
    terms = {name: given[name] for name in ("tokens_per_s", "like", "price_in", "price_out")}
    config = resolve(given, given["out"])
    if not given["estimate"]:
        for name, value in terms.items():
            if value is not None:
                raise ConfigError(f"--{name.replace('_', '-')} needs --estimate")
        _print(_prompts(config, given["limit"] or 3))
        return
    from streamsyn.pipeline.preview import Terms, estimate

    _print(estimate(config, Terms(**terms)))


def _prompts(config: "Config", limit: int) -> Iterator[str]:
    from streamsyn.pipeline.preview import preview as preview_seeds

    return preview_seeds(config, limit)


def _print(texts: Iterator[str]) -> None:
    try:
        for text in texts:
            click.echo(visible(text))
    except BrokenPipeError:
        # The reader (`head`, a pager) has closed the pipe. Discard what is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
