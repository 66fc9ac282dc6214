"""`streamsyn verify`: check a run directory."""

import logging
import sys
from pathlib import Path

import click

from streamsyn.cli.exits import EXIT_OTHER
from streamsyn.cli.options import examples
from streamsyn.plain_text import visible


@click.command(
    epilog=examples(
        "streamsyn verify runs/first",
        "streamsyn verify runs/first --repair",
    )
)
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option(
    "--repair", is_flag=True, help="Cut torn tails, add unlisted shards to the manifest, rebuild the index."
)
def verify(directory: Path, repair: bool) -> None:
    """Check every guarantee of a run directory by reading all of it. Exits with 1 if one is broken."""
    from streamsyn.pipeline.verify import repair as repair_directory
    from streamsyn.pipeline.verify import verify as verify_directory
    from streamsyn.telemetry import configure_logs

    configure_logs(as_json=False, level=logging.WARNING)
    if repair:
        repair_directory(directory)
    problems, found = verify_directory(directory)
    for line in found.notes:
        click.echo(f"note: {visible(line)}")
    for line in problems:
        click.echo(f"problem: {visible(line)}")
    counts = ", ".join(f"{number:,} {kind}" for kind, number in found.counts.items())
    click.echo(f"{directory}: {counts}; " + (f"{len(problems)} problems" if problems else "no problems"))
    sys.exit(EXIT_OTHER if problems else 0)
