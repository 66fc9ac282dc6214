"""`streamsyn status`: what a run or a daemon is doing, or how a run ended."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from streamsyn.cli.options import examples
from streamsyn.plain_text import visible


@click.command(
    epilog=examples(
        "streamsyn status runs/first",
        "streamsyn status runs/first --json | jq .state",
        "streamsyn status http://127.0.0.1:8200/v1/runs/first",
    )
)
@click.argument("place", metavar="DIR|URL")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(place: str, *, as_json: bool) -> None:
    """Print what a run or a daemon is doing, or how a run ended.

    A directory is read as it is on disk: that disturbs no run and asks no server. For a daemon with tokens,
    set STREAMSYN_TOKEN.
    """
    found, lines = _at_url(place) if place.startswith(("http://", "https://")) else _in_directory(Path(place))
    if as_json:
        click.echo(json.dumps(found))
        return
    for line in lines:
        click.echo(visible(line))


def _in_directory(directory: Path) -> tuple[dict[str, Any], Iterator[str]]:
    from streamsyn.pipeline.status import status as status_of
    from streamsyn.pipeline.status import status_lines

    found = status_of(directory)
    return found.as_dict(), status_lines(found, time.time())


def _at_url(url: str) -> tuple[dict[str, Any], Iterator[str]]:
    import asyncio  # which takes as long as all that `--help` needs

    from streamsyn.pipeline.status import daemon_status, daemon_status_lines

    found = asyncio.run(daemon_status(url))
    return found, daemon_status_lines(found)
