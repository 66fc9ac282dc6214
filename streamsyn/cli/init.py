"""`streamsyn init`: write a short configuration."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from streamsyn.cli.options import examples
from streamsyn.errors import ConfigError

if TYPE_CHECKING:
    from streamsyn.config.toml_text import StarterRecipe


@click.command(
    "init",
    epilog=examples(
        "streamsyn init",
        "streamsyn init long.toml --recipe sections",
    ),
)
@click.argument("path", default="run.toml", type=click.Path(path_type=Path))
@click.option(
    "--recipe",
    type=click.Choice(["context", "sections", "instruction"]),
    default="context",
    show_default=True,
    help="The recipe that the configuration is for.",
)
def init_config(path: Path, recipe: "StarterRecipe") -> None:
    """Write a short commented configuration to PATH (run.toml): ten keys, the others have their defaults.

    A file that exists is not overwritten.
    """
    from streamsyn.config.toml_text import starter

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(starter(recipe))
    except FileExistsError:
        raise ConfigError(f"{path} exists; give a different path, or remove it first") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    click.echo(
        f"{path}: set seeds.sources and fleet.servers, then look at the prompts: streamsyn preview {path}"
    )
