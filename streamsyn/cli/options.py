"""The options of `run`, which `preview` shares, and the configuration that they give."""

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamsyn.errors import ConfigError

if TYPE_CHECKING:
    from streamsyn.config.loading import Config
    from streamsyn.pipeline.request import RunRequest

Command = Callable[..., Any]

SERVER = click.option("--server", multiple=True, metavar="URL", help="URL of an SGLang server. Repeatable.")
SETTINGS = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a configuration key. Repeatable.",
)
NO_PROGRESS = click.option("--no-progress", is_flag=True, help="Log lines instead of a progress display.")
LOG_JSON = click.option("--log-json", is_flag=True, help="Log one JSON object a line to stderr.")
LAUNCH = [
    click.option("--launch", metavar="MODEL", help="Start a local SGLang server with MODEL for this run."),
    click.option(
        "--sglang-python",
        type=click.Path(path_type=Path),
        help="For --launch: Python interpreter with sglang.",
    ),
    click.option(
        "--sglang-arg",
        multiple=True,
        metavar="FLAG",
        help="For --launch: further flag of the server. Repeatable.",
    ),
]
CLUSTER = [
    click.option(
        "--ray",
        is_flag=False,
        flag_value="auto",
        metavar="[ADDRESS]",
        help="Have Ray start servers on the nodes of this cluster; without ADDRESS, of the one here.",
    ),
    click.option(
        "--model", metavar="MODEL", help="For --ray: model to serve, a path on each node or a name."
    ),
    click.option("--replicas", type=click.IntRange(min=1), metavar="N", help="For --ray: number of servers."),
    click.option(
        "--gpus-per-replica", type=click.IntRange(min=0), metavar="G", help="For --ray: GPUs of each server."
    ),
]
_INPUT_OPTIONS = [
    click.argument("config", required=False, type=click.Path(path_type=Path, dir_okay=False)),
    click.option(
        "--seeds",
        multiple=True,
        metavar="PATH|-",
        help="File, directory, glob, URL, org/name on the Hugging Face hub, or - for stdin. Repeatable.",
    ),
    SERVER,
    click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Read at most N seeds."),
    SETTINGS,
]
_OUTPUT_OPTIONS = [
    click.option(
        "--stdout",
        "to_stdout",
        is_flag=True,
        help="Write samples to stdout as NDJSON, and nothing else.",
    ),
    click.option(
        "--replay",
        is_flag=True,
        help="With --stdout: start with the samples that earlier runs wrote.",
    ),
    NO_PROGRESS,
    LOG_JSON,
    click.option(
        "--take-over",
        is_flag=True,
        help="Resume although another process has --out open, or its lock is stuck: that process stops.",
    ),
    click.option(
        "--no-preflight",
        is_flag=True,
        help="Do not check a sample of the seeds, and one request, before a new run starts.",
    ),
    click.option(
        "--train",
        metavar="CONFIG",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Train during the run, with the [train] section of this TOML file.",
    ),
    *LAUNCH,
    *CLUSTER,
]


def examples(*commands: str) -> str:
    """Return the epilog of a command: its examples, one per line."""
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])


def run_options(command: Command) -> Command:
    """Add the options of `run` to a command. Only `run` requires --out."""
    out = click.option(
        "--out",
        type=click.Path(path_type=Path, file_okay=False),
        required=command.__name__ == "run",
        help="Run directory; an existing one is resumed.",
    )
    return with_options(_INPUT_OPTIONS, [out], _OUTPUT_OPTIONS)(command)


def with_options(*groups: Sequence[Command]) -> Callable[[Command], Command]:
    """Return a decorator that adds options to a command, in this order."""

    def add(command: Command) -> Command:
        decorated = command
        for option in reversed([option for group in groups for option in group]):
            decorated = option(decorated)
        return decorated

    return add


def resolve(given: dict[str, Any], out: Path | None) -> "Config":
    """Return the configuration: the file, or the one saved in `out`; options and --set override it."""
    from streamsyn.library.arguments import resolve_config

    return resolve_config(given.get("config"), out, sources=given.get("seeds", ()), **_overriding(given))


def request_of(given: dict[str, Any], out: Path, **more: Any) -> "RunRequest":
    """Return the request for a run into `out`; `more` are further fields of it."""
    from streamsyn.library.arguments import make_request

    request, _ = make_request(
        given.get("config"),
        out=out,
        seeds=given.get("seeds") or None,
        launch=given["launch"],
        launch_python=given["sglang_python"],
        launch_args=given["sglang_arg"],
        show_progress=not (given["no_progress"] or given["log_json"]),
        **_overriding(given),
        **more,
    )
    return request


def _overriding(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that override the configuration."""
    from streamsyn.config.loading import parse_override

    return {
        "servers": given["server"],
        "limit": given.get("limit"),
        "overrides": [*cluster_overrides(given), *map(parse_override, given["settings"])],
    }


@contextmanager
def imports() -> Iterator[None]:
    """Import quickly what a run needs, within the block.

    Without the garbage collector: modules stay. And aiohttp in a thread: it loads the system's certificates
    when it is imported, which takes a tenth of the time and needs no Python.
    """
    gc.disable()
    threading.Thread(target=import_module, args=("aiohttp",), name="import-aiohttp", daemon=True).start()
    try:
        yield
    finally:
        gc.enable()


def cluster_overrides(given: dict[str, Any]) -> list[tuple[str, Any]]:
    """The keys of `cluster` that the options of `CLUSTER` set.

    Raises:
        ConfigError: One of them was given without --ray.
    """
    keys = {
        "ray": "address",
        "model": "model",
        "replicas": "replicas",
        "gpus_per_replica": "gpus_per_replica",
    }
    found = {name: given[name] for name in keys if given.get(name) is not None}
    if found and "ray" not in found:
        option = next(iter(found)).replace("_", "-")
        meant = "; the model to ask for is set with --set fleet.model=VALUE" if option == "model" else ""
        raise ConfigError(f"--{option} is for servers that Ray starts: it needs --ray{meant}")
    return [(f"cluster.{keys[name]}", value) for name, value in found.items()]


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class Size(click.ParamType[int]):
    """A number of bytes, such as 500MB or 1GiB."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip().lower().removesuffix("b")
        number = text.rstrip("kmgi")
        try:
            size = float(number) * _UNITS[text[len(number) :]]
        except (ValueError, KeyError):
            size = 0
        if not 1 <= size < 2**63:
            self.fail(f"invalid size {value!r}; expected bytes, such as 500000, 500MB or 1GiB", param, ctx)
        return int(size)
