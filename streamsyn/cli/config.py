"""`streamsyn config`: print the resolved configuration."""

from pathlib import Path

import click

from streamsyn.cli.options import examples


@click.command(
    "config",
    epilog=examples(
        "streamsyn config > run.toml",
        "streamsyn config run.toml --set recipe.target_words=3000",
    ),
)
@click.argument("config", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key. Repeatable.")
def show_config(config: Path | None, settings: tuple[str, ...]) -> None:
    """Print the resolved configuration as TOML: every key with its meaning and value."""
    from streamsyn.config.loading import load, parse_override
    from streamsyn.config.toml_text import as_toml

    click.echo(as_toml(load(config, map(parse_override, settings))), nl=False)
