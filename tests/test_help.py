"""Each command ends its help with two or three examples, and they parse."""

import shlex
from pathlib import Path

import click
import pytest

from streamsyn.cli.main import cli


def examples_of(name: str) -> list[str]:
    """The command lines at the end of a command's help."""
    epilog = cli.commands[name].epilog or ""
    return [line.strip() for line in epilog.partition("Examples:")[2].splitlines() if line.strip()]


def commands_in(example: str) -> list[list[str]]:
    """The words of each `streamsyn` in a line of shell, up to a pipe or a redirection."""
    found: list[list[str]] = []
    is_open = False
    for word in shlex.split(example):
        if word == "streamsyn":
            found.append([])
            is_open = True
        elif word in (">", "|", "&"):
            is_open = False
        elif is_open:
            found[-1].append(word)
    return found


def parse(example: str) -> list[str]:
    """Parse the commands of a line, and return their names."""
    commands = commands_in(example)
    for name, *arguments in commands:
        cli.commands[name].make_context(name, arguments)
    return [name for name, *_ in commands]


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_the_examples_parse(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the directories that they name; nothing is run."""
    monkeypatch.chdir(tmp_path)
    for run in ("first", "second"):
        (tmp_path / "runs" / run).mkdir(parents=True)
    found = examples_of(name)

    assert 2 <= len(found) <= 3, found
    for example in found:
        assert name in parse(example)


def test_the_examples_of_the_group_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each names a command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    found = [line for line in (cli.help or "").splitlines() if line.strip().startswith("streamsyn ")]

    assert found
    for example in found:
        assert parse(example)


def test_a_wrong_example_does_not_parse() -> None:
    """So that the test above can fail."""
    with pytest.raises(click.UsageError):
        cli.commands["config"].make_context("config", ["--sett", "run.seed=1"])
