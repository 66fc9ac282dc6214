"""The command line of a run, which several commands take, and the configuration that it makes up."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from streamsyn.config.loading import Config

Command = Callable[..., Any]


def run_options(command: Command) -> Command:
    """The options of `run`, and of what takes the command line of a run; only `run` insists on --out."""
    options = [
        click.argument("config", required=False, type=click.Path(path_type=Path, dir_okay=False)),
        click.option(
            "--seeds",
            multiple=True,
            metavar="PATH|-",
            help="File, directory, glob, or - for NDJSON on stdin. Repeatable.",
        ),
        click.option("--server", multiple=True, metavar="URL", help="An SGLang server. Repeatable."),
        click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Take at most N seeds."),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override a key of the configuration. Repeatable.",
        ),
        click.option(
            "--out",
            type=click.Path(path_type=Path, file_okay=False),
            required=command.__name__ == "run",
            help="Run directory; an existing one is resumed.",
        ),
        click.option(
            "--stdout",
            "to_stdout",
            is_flag=True,
            help="Print samples as NDJSON; nothing else gets to stdout.",
        ),
        click.option(
            "--replay",
            is_flag=True,
            help="With --stdout: begin with the samples that earlier runs have printed.",
        ),
        click.option("--no-progress", is_flag=True, help="Plain log lines, even on a terminal."),
        click.option("--log-json", is_flag=True, help="One JSON object a line on stderr, and nothing else."),
        click.option(
            "--train",
            metavar="CONFIG",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Tune a model on the samples as they come: a TOML file with train.model.",
        ),
        click.option("--launch", metavar="MODEL", help="Start an SGLang server for MODEL, for this run."),
        click.option(
            "--sglang-python", type=click.Path(path_type=Path), help="Python that has sglang, for --launch."
        ),
        click.option(
            "--sglang-arg",
            multiple=True,
            metavar="FLAG",
            help="A further flag for the launched server. Repeatable.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def resolve(given: dict[str, Any], out: Path | None) -> "Config":
    """The configuration: the file, or what the directory was made with; flags and --set over it."""
    from streamsyn.config.loading import load, parse_override

    overrides: list[tuple[str, Any]] = []
    if given["config"] is None and out is not None:
        overrides += _remembered(out)
    if given["seeds"]:
        overrides.append(("seeds.sources", [{"path": path} for path in given["seeds"]]))
    if given["server"]:
        overrides.append(("fleet.servers", list(given["server"])))
        overrides += [("fleet.servers_file", None), ("fleet.servers_dns", None)]
    if given["limit"]:
        overrides.append(("seeds.limit", given["limit"]))
    overrides += map(parse_override, given["settings"])
    return load(given["config"], overrides)


def _remembered(out: Path) -> list[tuple[str, Any]]:
    """The sections that a run directory was made with, but for what holds for one run only."""
    from streamsyn.sink.rundir import saved_config

    saved = saved_config(out)
    if saved is None:
        return []
    sections = saved.model_dump(exclude_none=True)
    sections["seeds"].pop("limit", None)
    sections["seeds"]["sources"] = [
        source for source in sections["seeds"]["sources"] if source["path"] != "-"
    ]
    return list(sections.items())
