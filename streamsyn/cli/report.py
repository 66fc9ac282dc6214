"""`streamsyn report`."""

import os
import sys
from pathlib import Path

import click


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option(
    "--to",
    metavar="FILE|-",
    help="Where the page is written; - is stdout.  [default: DIRECTORY/report.html]",
)
def report(directory: Path, to: str | None) -> None:
    """Write one HTML page on a run: whether it is fit for training, figures, samples to read.

    The page is a file of its own and loads nothing. A run may be writing to the directory; the same
    directory gives the same page.
    """
    from streamsyn.report.page import write_report

    if to == "-":
        page, _ = write_report(directory)
        try:
            sys.stdout.buffer.write(page)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever reads has seen enough. What is still buffered has to go somewhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return
    path = Path(to) if to is not None else directory / "report.html"
    _, found = write_report(directory, path)
    click.echo(f"{path}: {found.headline}. {found.reason}")
