"""Load the configuration: one TOML file, with overrides on top."""

import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from streamsyn.config.fields import Section, operational
from streamsyn.config.mistakes import describe
from streamsyn.config.sections import (
    AssemblySection,
    ChecksSection,
    FleetSection,
    RecipeSection,
    RunSection,
    ScoringSection,
    SeedsSection,
    SinkSection,
)
from streamsyn.config.serve_section import ServeSection
from streamsyn.config.train_section import TrainSection
from streamsyn.errors import ConfigError


class Config(Section):
    """The whole configuration: one section per stage."""

    run: RunSection = RunSection()
    seeds: SeedsSection = SeedsSection()
    recipe: RecipeSection = RecipeSection()
    checks: ChecksSection = ChecksSection()
    scoring: ScoringSection = ScoringSection()
    fleet: FleetSection = FleetSection()
    sink: SinkSection = SinkSection()
    assembly: AssemblySection = AssemblySection()
    serve: Annotated[ServeSection, operational] = ServeSection()
    train: Annotated[TrainSection, operational] = TrainSection()


def load(path: Path | None, overrides: Iterable[tuple[str, Any]] = ()) -> Config:
    """Load the TOML file `path`, or the defaults, and apply `overrides`: pairs of dotted key and value.

    Raises:
        ConfigError: The file cannot be read, a key is unknown or a value invalid; the message names each.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}{_hint(path)}") from error
        except ValueError as error:  # from tomllib, or from int() for a number with too many digits
            raise ConfigError(f"{path}: invalid TOML: {error}{_hint(path)}") from error
    for key, value in overrides:
        _put(tree, key, value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        where = f"{path}: " if path is not None else ""
        raise ConfigError(where + "; ".join(describe(error.errors(), known_keys()))) from error


def _hint(path: Path) -> str:
    """What to do with a file, or a URL, that is in the place of the configuration by mistake."""
    if path.suffix == ".toml":
        return ""
    if str(path).startswith(("http:", "https:")):
        return "; servers are given with --server URL"
    return f"; the configuration is a TOML file, seeds are given with --seeds {path}"


def parse_override(text: str) -> tuple[str, Any]:
    """Split the `key=value` of `--set`. The value is TOML if it parses as TOML, else plain text.

    Raises:
        ConfigError: `text` has no key or no `=`.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: expected KEY=VALUE, such as run.seed=1")
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except ValueError:
        parsed = value
    return key.strip(), parsed


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"unknown key {key}: {section} is a value, not a table")
    tree[name] = value


def known_keys() -> list[str]:
    """Return every key, dotted, with `*` for the name of a task or the number of a source."""
    return list(_keys(Config, ""))


def _keys(section: type[Section], prefix: str) -> Iterable[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        below = next(_sections_in(kind), None)
        is_table = below is kind or (get_origin(kind) in (UnionType, Union) and below in get_args(kind))
        if below is not kind:
            yield prefix + name
        if below is not None:
            yield from _keys(below, f"{prefix}{name}." if is_table else f"{prefix}{name}.*.")


def _sections_in(kind: Any) -> Iterator[type[Section]]:
    """Yield the section classes in the annotation `kind`."""
    if isinstance(kind, type) and issubclass(kind, Section):
        yield kind
    for part in get_args(kind):
        yield from _sections_in(part)
