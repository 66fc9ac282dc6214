"""From the arguments of `open_run`, `run_sync` and the command line to a configuration and a request."""

import os
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from streamsyn.config.loading import Config, load
from streamsyn.errors import ConfigError
from streamsyn.library.seed_feed import SeedFeed, SeedRows
from streamsyn.pipeline.request import RunRequest
from streamsyn.recipes.registry import load_recipe
from streamsyn.seeds.inbox import Inbox
from streamsyn.sink.rundir import read_run_json, saved_config

PathLike: TypeAlias = str | os.PathLike[str]
ConfigLike: TypeAlias = PathLike | Mapping[str, Any] | Config
Servers: TypeAlias = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]
Seeds: TypeAlias = PathLike | Iterable[PathLike] | SeedRows
Overrides: TypeAlias = Mapping[str, Any] | Iterable[tuple[str, Any]]


def resolve_config(
    config: ConfigLike | None,
    out: Path | None,
    *,
    sources: Sequence[PathLike] = (),
    servers: Servers | None = None,
    limit: int | None = None,
    overrides: Overrides = (),
) -> Config:
    """The configuration of a run: a file, sections, or what `out` was begun with; arguments override it.

    Args:
        config: A TOML file, sections as a dict, or a configuration. None: the one saved in `out`, without
            the keys of a single run (`seeds.limit`, stdin), or the defaults.
        out: The run directory, if there is one.
        sources: Paths of seeds, in place of `seeds.sources`.
        servers: Servers, in place of those of the configuration.
        limit: `seeds.limit`.
        overrides: Dotted keys and their values.

    Raises:
        ConfigError: The file cannot be read, a key is unknown or a value invalid; the message names each.
    """
    path, given = _given(config, out)
    if sources:
        given.append(("seeds.sources", [{"path": os.fspath(path)} for path in sources]))
    if servers:
        single = isinstance(servers, str | Mapping)
        given.append(("fleet.servers", [servers] if single else list(servers)))
        given += [("fleet.servers_file", None), ("fleet.servers_dns", None)]
    if limit is not None:
        given.append(("seeds.limit", limit))
    return load(path, [*given, *_pairs(overrides)])


def make_request(
    config: ConfigLike | None,
    *,
    out: PathLike,
    seeds: Seeds | None = None,
    servers: Servers | None = None,
    limit: int | None = None,
    overrides: Overrides = (),
    keep_open: bool | None = False,
    **more: Any,
) -> tuple[RunRequest, SeedFeed | None]:
    """Return the request for a run, and what feeds the seeds of an iterable to it.

    Args:
        config: As `resolve_config`.
        out: The run directory.
        seeds: Paths, which the run reads, or an iterable of seeds, which has to be fed to it.
        servers: As `resolve_config`.
        limit: As `resolve_config`.
        overrides: As `resolve_config`.
        keep_open: Whether seeds can be submitted until the run is told that no more come. None: if it has
            no seeds otherwise and the directory is new.
        more: Fields of the request.

    Raises:
        ConfigError: As `resolve_config`, or `seeds` is of the wrong type.
    """
    root = Path(out)
    paths, rows = _sorted_out(seeds)
    if rows is not None:
        overrides = [("seeds.sources", []), *_pairs(overrides)]
    resolved = resolve_config(config, root, sources=paths, servers=servers, limit=limit, overrides=overrides)
    if keep_open is None:
        keep_open = rows is None and not resolved.seeds.sources and read_run_json(root) is None
    inbox = feed = None
    if keep_open or rows is not None:
        recipe = load_recipe(resolved.recipe, resolved.checks)
        inbox = Inbox(root, resolved.seeds, takes_documents=recipe.takes_documents)
        if inbox.exists():  # an earlier run may have been told that no more seeds come
            inbox.reopen()
    if rows is not None and inbox is not None:
        feed = SeedFeed(rows, inbox, closes=not keep_open)
    return RunRequest(config=resolved, out=root, inbox=inbox, **more), feed


def _pairs(overrides: Overrides) -> Iterable[tuple[str, Any]]:
    return overrides.items() if isinstance(overrides, Mapping) else overrides


def _given(config: ConfigLike | None, out: Path | None) -> tuple[Path | None, list[tuple[str, Any]]]:
    """The file of a configuration, and sections."""
    match config:
        case None:
            return None, [] if out is None else _saved_sections(out)
        case Config():
            return None, list(config.model_dump(exclude_unset=True).items())
        case Mapping():
            return None, list(config.items())
        case _:
            return Path(config), []


def _saved_sections(out: Path) -> list[tuple[str, Any]]:
    """The sections saved in a run directory, without the keys of a single run (limit, stdin)."""
    saved = saved_config(out)
    if saved is None:
        return []
    sections = saved.model_dump(exclude_none=True)
    sections["seeds"].pop("limit", None)
    sections["seeds"]["sources"] = [
        source for source in sections["seeds"]["sources"] if source["path"] != "-"
    ]
    return list(sections.items())


def _sorted_out(seeds: Seeds | None) -> tuple[list[PathLike], SeedRows | None]:
    """Tell paths from seeds.

    Raises:
        ConfigError: It is neither.
    """
    if seeds is None:
        return [], None
    if isinstance(seeds, str | os.PathLike):
        return [seeds], None
    if isinstance(seeds, Mapping | bytes) or not isinstance(seeds, Iterable | AsyncIterable):
        raise ConfigError(
            f"seeds must be a path, a list of paths, or an iterable of dicts, not {type(seeds).__name__}"
        )
    if isinstance(seeds, list | tuple) and seeds and all(isinstance(one, str | os.PathLike) for one in seeds):
        return list(seeds), None
    return [], seeds  # type: ignore[return-value] # what is not a seed among them becomes a reject
