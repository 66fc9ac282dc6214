"""`streamsyn status`: what a run is doing, or how it ended."""

import json
import time
from pathlib import Path

import click

from streamsyn.cli.options import examples
from streamsyn.plain_text import visible


@click.command(
    epilog=examples(
        "streamsyn status runs/first",
        "streamsyn status runs/first --json | jq .state",
    )
)
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(directory: Path, *, as_json: bool) -> None:
    """Print what a run is doing, or how it ended, by what is on disk. Disturbs no run, asks no server."""
    from streamsyn.pipeline.status import status as status_of
    from streamsyn.pipeline.status import status_lines

    found = status_of(directory)
    if as_json:
        click.echo(json.dumps(found.as_dict()))
        return
    for line in status_lines(found, time.time()):
        click.echo(visible(line))
