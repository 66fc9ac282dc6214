"""`streamsyn demo`."""

import sys
from pathlib import Path

import click


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("demo-out"), show_default=True
)
@click.option("--model", help="Model to serve; by default the packaged one.")
@click.option("--sglang-python", type=click.Path(path_type=Path), help="Python that has sglang.")
def demo(out: Path, model: str | None, sglang_python: Path | None) -> None:
    """Start a real SGLang server, write contexts for a dozen packaged seeds, show one sample."""
    from streamsyn.pipeline.demo import demo as run_demo
    from streamsyn.telemetry import configure_logs

    configure_logs(as_json=False)
    sys.exit(run_demo(out, model, sglang_python))
