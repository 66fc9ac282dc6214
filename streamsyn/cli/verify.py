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
    """Check every guarantee of a run directory by reading all of it. Exits with 1 if one is broken.

    With partitions, each is checked, and that no seed has outcomes in two of them.
    """
    from streamsyn.pipeline.verify import repair as repair_directory
    from streamsyn.pipeline.verify_joined import verify_joined
    from streamsyn.sink.partitions import begun_directories
    from streamsyn.telemetry import configure_logs

    configure_logs(as_json=False, level=logging.WARNING)
    for one in begun_directories(directory) if repair else ():
        repair_directory(one)
    found = verify_joined(directory)
    for line in found.notes:
        click.echo(f"note: {visible(line)}")
    for line in found.problems:
        click.echo(f"problem: {visible(line)}")
    counts = ", ".join(f"{number:,} {kind}" for kind, number in found.counts.items())
    problems = f"{len(found.problems)} problems" if found.problems else "no problems"
    click.echo(f"{directory}: {counts}; {problems}")
    sys.exit(EXIT_OTHER if found.problems else 0)
