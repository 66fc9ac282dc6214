"""`streamsyn preview`."""

import os
from typing import Any

import click

from streamsyn.cli.options import resolve, run_options


@click.command()
@run_options
def preview(**given: Any) -> None:
    """Print what would be sent for the first seeds (3, or --limit); asks no server, writes nothing.

    Takes the command line of a run; options that shape no prompt have no effect.
    """
    from streamsyn.pipeline.preview import preview as preview_seeds

    config = resolve(given, given["out"])
    try:
        for text in preview_seeds(config, given["limit"] or 3):
            click.echo(text)
    except BrokenPipeError:
        # Whoever reads (`head`, a pager) has seen enough. What is still buffered has to go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
