"""`streamsyn report`: one HTML page about a run."""

import os
import sys
from pathlib import Path

import click

from streamsyn.cli.options import examples
from streamsyn.plain_text import visible


@click.command(
    epilog=examples(
        "streamsyn report runs/first",
        "streamsyn report runs/first --to - > page.html",
    )
)
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option(
    "--to",
    metavar="FILE|-",
    help="File to write, or - for stdout.  [default: DIRECTORY/report.html]",
)
def report(directory: Path, to: str | None) -> None:
    """Write one HTML page about a run: whether it is fit for training, statistics, samples to read.

    The page is self-contained. The run may still be going on. The same directory gives the same page.
    """
    from streamsyn.report.page import write_report

    if to == "-":
        page, _ = write_report(directory)
        try:
            sys.stdout.buffer.write(page)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader has closed the pipe. Discard what is still buffered.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return
    path = Path(to) if to is not None else directory / "report.html"
    _, found = write_report(directory, path)
    click.echo(visible(f"{path}: {found.headline}. {found.reason}"))
