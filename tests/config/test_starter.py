"""The configuration that `streamsyn init` writes."""

import tomllib
from pathlib import Path
from typing import get_args

import pytest
from click.testing import CliRunner

from streamsyn.cli.main import cli
from streamsyn.config.loading import load
from streamsyn.config.starter import StarterRecipe, starter
from streamsyn.errors import ConfigError


@pytest.mark.parametrize("recipe", get_args(StarterRecipe))
def test_a_starter_has_ten_keys_with_their_meaning(tmp_path: Path, recipe: StarterRecipe) -> None:
    """It loads, and each key has a comment above it."""
    text = starter(recipe)
    path = tmp_path / "run.toml"
    path.write_text(text)
    keys = [(name, key) for name, table in tomllib.loads(text).items() for key in table]
    lines = text.splitlines()

    assert recipe == load(path).recipe.use
    assert 10 == len(keys)
    assert 50 > len(lines)
    for _, key in keys:
        at = next(number for number, line in enumerate(lines) if line.startswith(f"{key} = "))
        assert lines[at - 1].startswith("# ")
        assert lines[at - 1].endswith(".")


def test_init_does_not_overwrite(tmp_path: Path) -> None:
    """A file that exists stays as it is; a folder that does not exist is named."""
    path = tmp_path / "run.toml"
    first = CliRunner().invoke(cli, ["init", str(path)])
    written = path.read_text()
    second = CliRunner().invoke(cli, ["init", str(path), "--recipe", "sections"])
    nowhere = CliRunner().invoke(cli, ["init", str(tmp_path / "no" / "run.toml")])

    assert 0 == first.exit_code
    assert written == path.read_text()
    assert isinstance(second.exception, ConfigError)
    assert f"{path} exists" in str(second.exception)
    assert isinstance(nowhere.exception, ConfigError)
    assert "No such file or directory" in str(nowhere.exception)
