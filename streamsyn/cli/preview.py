"""`streamsyn preview`: print the prompts of the first seeds."""

import os
from typing import Any

import click

from streamsyn.cli.options import examples, resolve, run_options
from streamsyn.plain_text import visible


@click.command(
    epilog=examples(
        "streamsyn preview --seeds pairs.jsonl",
        "streamsyn preview run.toml --limit 1 --set recipe.use=sections",
    )
)
@run_options
def preview(**given: Any) -> None:
    """Print what would be sent for the first seeds (3, or --limit). Contacts no server, writes nothing.

    Takes the same options as `run`; those that do not shape prompts have no effect.
    """
    from streamsyn.pipeline.preview import preview as preview_seeds
    from streamsyn.telemetry import configure_logs

    configure_logs(as_json=given["log_json"])
    config = resolve(given, given["out"])
    try:
        for text in preview_seeds(config, given["limit"] or 3):
            click.echo(visible(text))
    except BrokenPipeError:
        # The reader (`head`, a pager) has closed the pipe. Discard what is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
