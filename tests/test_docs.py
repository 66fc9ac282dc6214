"""The README says what is there, and all that is there."""

import re
from pathlib import Path

import pytest

import streamsyn
from streamsyn.cli.main import cli
from streamsyn.config.loading import known_keys

ROOT = Path(streamsyn.__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_stands_in_the_readme_and_has_help(name: str) -> None:
    """A command that nobody reads of does not exist."""
    assert f"`streamsyn {name}" in README
    assert cli.commands[name].help


def test_every_command_in_the_readme_exists() -> None:
    """The reverse."""
    assert set(re.findall(r"`streamsyn (\w+)", README)) <= set(cli.commands)


def test_every_key_in_the_readme_exists() -> None:
    """Keys written as `section.name` are keys of the configuration."""
    sections = {key.split(".")[0] for key in known_keys()}
    named = {key for key in re.findall(r"`(\w+\.\w+)`", README) if key.split(".")[0] in sections}

    assert named
    assert named <= set(known_keys())


def test_every_path_in_the_tree_exists() -> None:
    """Files and folders that the README names are there."""
    tree = README.split("```\nstreamsyn/\n")[1].split("```")[0]
    paths, folder = [], ROOT / "streamsyn"
    for line in tree.splitlines():
        if not line.startswith("  "):
            break
        parent = folder if line.startswith("    ") else ROOT / "streamsyn"
        named = [name.rstrip(":;,") for name in line.split()]
        found = [parent / name for name in named if re.fullmatch(r"\w+(\.py|/)", name)]
        folder = found[0] if not line.startswith("    ") else folder
        paths += found
    paths += [ROOT / name for name in re.findall(r"`((?:tests|benchmarks|streamsyn)/[\w/.]+)`", README)]

    assert len(paths) > 15
    assert [] == [str(path) for path in paths if not path.exists()]


def test_targets_in_the_readme_exist() -> None:
    """`make demo` and its like are targets."""
    makefile = (ROOT / "Makefile").read_text("utf-8")

    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
