"""Load the configuration: one TOML file, with overrides on top. Mistakes are described in plain words."""

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from streamsyn.config.command_sections import ClusterSection, ServeSection, TrainSection
from streamsyn.config.fields import Section, operational
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
from streamsyn.errors import ConfigError

_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a table",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "frozenset_type": "a list",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller number",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "mapping_type": "a table",
    "model_attributes_type": "a table",
    "model_type": "a table",
    "path_type": "a path",
    "set_type": "a list",
    "string_too_short": "text of {min_length} characters or more",
    "string_type": "text",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
}
"""What is expected, by pydantic's type of problem."""
_OTHER_NAMES = {
    "batch_size": "train.rows_per_step",
    "lr": "train.learning_rate",
    "max_length": "train.seq_len",
    "max_new_tokens": "recipe.max_tokens",
    "model_name": "fleet.model",
    "output": "seeds.fields.answer",
    "timeout": "fleet.request_timeout_s",
    "top_p": "recipe.sampling.top_p",
    "url": "fleet.servers",
}
"""What other software calls some keys."""


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
    cluster: Annotated[ClusterSection, operational] = ClusterSection()
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


def describe(problems: Iterable[Any], known: Sequence[str]) -> Iterator[str]:
    """Describe pydantic's problems, one text per key.

    Where a value may have several types, pydantic reports a problem for each of them: they are joined.

    Args:
        problems: As `ValidationError.errors()` returns them.
        known: Every key, dotted, with `*` for a name or a number.
    """
    by_key: dict[str, list[Any]] = {}
    for problem in problems:
        key = ".".join(str(part) for part in problem["loc"] if not _is_type_name(str(part)))
        by_key.setdefault(key, []).append(problem)
    for key, found in by_key.items():
        if any(longer.startswith(f"{key}.") for longer in by_key):
            continue  # the problem of the longer key is more precise
        if found[0]["type"] == "extra_forbidden":
            yield f"unknown key {key}{suggestion(key, known)}"
        else:
            yield f"{key}: {_expected(found)}"


def suggestion(key: str, known: Sequence[str]) -> str:
    """Return what to add to "unknown key KEY": the likely key, else the keys beside it."""
    *level, name = key.split(".")
    siblings = sorted(
        {
            parts[len(level)]
            for parts in (key.split(".") for key in known)
            if len(parts) > len(level)
            and all(part in ("*", above) for part, above in zip(parts, level, strict=False))
        }
    )
    if _OTHER_NAMES.get(name, "").removesuffix(f".{name}") in known:
        return f"; the nearest known one is {_OTHER_NAMES[name]}"
    if near := difflib.get_close_matches(name, siblings, n=1, cutoff=0.6):
        return f"; the nearest known one is {'.'.join([*level, *near])}"
    if elsewhere := [other for other in known if other.rpartition(".")[2] == name]:
        return f"; the nearest known one is {' or '.join(elsewhere[:3])}"
    if siblings and level:
        return f"; the keys there are {', '.join(siblings)}"
    near = difflib.get_close_matches(key, known, 1, 0.6)
    sections = ", ".join(sorted({other.partition(".")[0] for other in known}))
    return f"; the nearest known one is {near[0]}" if near else f"; the sections are {sections}"


def keys_named(name: str, known: Iterable[str]) -> list[str]:
    """Return the keys that a person may mean by the name of an option that does not exist."""
    name = name.lstrip("-").replace("-", "_")
    found = [key for key in known if key.rpartition(".")[2] == name and "*" not in key]
    return found or [key for key in (_OTHER_NAMES.get(name),) if key is not None]


def _expected(problems: Sequence[Mapping[str, Any]]) -> str:
    """What is expected, in words, and the value; a close choice is suggested."""
    value = problems[0]["input"]
    sentences = [p["msg"].removeprefix("Value error, ") for p in problems if p["type"] == "value_error"]
    wanted = dict.fromkeys(
        _EXPECTED[problem["type"]].format(**problem.get("ctx", {}))
        for problem in problems
        if problem["type"] in _EXPECTED
    )
    unknown = [p["msg"] for p in problems if p["type"] not in {*_EXPECTED, "value_error"}]
    expected = [f"expected {' or '.join(wanted)}"] if wanted else []
    choices = [
        choice.strip("' ")
        for problem in problems
        if problem["type"] == "literal_error"
        for choice in problem["ctx"]["expected"].replace(" or ", ", ").split(",")
    ]
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{' or '.join([*expected, *sentences, *unknown])} (got {value!r}){hint}"


def _is_type_name(part: str) -> bool:
    """Whether a part of pydantic's location is one of the types of a value, not a key."""
    return part in ("str", "bool", "int", "float") or "[" in part or part.endswith(("-float", "Section"))
