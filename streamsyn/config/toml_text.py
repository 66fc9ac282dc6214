"""The configuration as TOML with the meaning of each key: all keys, or those that `streamsyn init` writes."""

import ast
import inspect
import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias

from streamsyn.config.fields import Section
from streamsyn.config.loading import Config, load
from streamsyn.plain_text import without_userinfo

StarterRecipe: TypeAlias = Literal["context", "sections", "instruction"]
_STARTER_LENGTHS: Final[Mapping[StarterRecipe, tuple[str, ...]]] = MappingProxyType(
    {
        "context": ("recipe.target_words", "recipe.max_tokens"),
        "sections": ("recipe.target_tokens", "recipe.section_tokens"),
        "instruction": ("recipe.window_words", "recipe.max_tokens"),
    }
)
"""The two keys that decide how long a context of each recipe is."""
_STARTER_KEYS: Final = (
    "run.max_reject_fraction",
    "seeds.sources",
    "recipe.use",
    "recipe.temperature",
    "checks.min_words",
    "checks.near_duplicate",
    "fleet.servers",
    "assembly.contexts_per_sample",
)
_STARTER_VALUES: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "run.max_reject_fraction": 0.2,
        "seeds.sources": [{"path": "pairs.jsonl"}],
        "recipe.window_words": 3000,
        "checks.near_duplicate": "flag",
        "fleet.servers": ["http://127.0.0.1:30000"],
    }
)
"""Values other than the defaults."""
_FIRST_SENTENCES: Final = re.compile(r"(?s)(.{40,}?\.)(?=\s|$)")


def as_toml(config: Config) -> str:
    """Return `config` as TOML, each key below its meaning. A key without a value is commented out.

    Passwords are cut from URLs.
    """
    return "\n".join(_section(config, "")) + "\n"


def _section(section: Section, name: str) -> Iterator[str]:
    below: list[tuple[str, Section]] = []
    if name:
        meaning = inspect.cleandoc(type(section).__doc__ or "")
        yield "\n" + "".join(f"# {line}".rstrip() + "\n" for line in meaning.splitlines()) + f"[{name}]"
    for key in type(section).model_fields:
        value = getattr(section, key)
        path = f"{name}.{key}" if name else key
        if isinstance(value, Section):
            below.append((path, value))
        elif isinstance(value, dict) and any(isinstance(entry, Section) for entry in value.values()):
            below += [(f"{path}.{_key(entry)}", settings) for entry, settings in value.items()]
        else:
            yield from _line(key, value, meanings(type(section)).get(key, ""))
    for path, part in below:
        yield from _section(part, path)


@cache
def meanings(section: type[Section]) -> dict[str, str]:
    """Return what the docstring below each key of a section says."""
    (owner,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(owner, ast.ClassDef), "a section is a class"
    found: dict[str, str] = {}
    for key, below in pairwise(owner.body):
        match key, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(meaning))):
                found[name] = inspect.cleandoc(meaning)
    return found


def _line(key: str, value: Any, meaning: str) -> Iterator[str]:
    for line in meaning.splitlines():
        yield f"# {line}"
    yield f"# {key} =" if value is None else f"{key} = {toml_value(value)}"


def toml_value(value: Any) -> str:
    """Return a value as TOML."""
    match value:
        case bool():
            return "true" if value else "false"
        case float() if math.isinf(value) or math.isnan(value):
            return str(value)
        case int() | float():
            return repr(value)
        case str() | Path():
            return _string(without_userinfo(str(value)))
        case dict():
            return "{" + ", ".join(f"{_key(key)} = {toml_value(entry)}" for key, entry in value.items()) + "}"
        case Section():
            set_fields = {key: entry for key, entry in value if entry is not None}
            return toml_value(set_fields)
        case _:
            return "[" + ", ".join(map(toml_value, value)) + "]"


def _key(key: str) -> str:
    bare = key.replace("-", "").replace("_", "")
    return key if bare.isascii() and bare.isalnum() else _string(key)


def _string(text: str) -> str:
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return (
        '"'
        + "".join(escapes.get(char, char if char.isprintable() else f"\\U{ord(char):08x}") for char in text)
        + '"'
    )


def starter(recipe: StarterRecipe) -> str:
    """Return a configuration of ten keys for a recipe, each with its meaning; others have their defaults."""
    own = {**_STARTER_VALUES, "recipe.use": recipe}
    if recipe == "instruction":
        own["seeds.sources"] = [{"path": "documents.jsonl"}]
    order = {name: place for place, name in enumerate(Config.model_fields)}
    keys = sorted((*_STARTER_KEYS, *_STARTER_LENGTHS[recipe]), key=lambda key: order[key.partition(".")[0]])
    config = load(None, [(key, value) for key, value in own.items() if key in keys])
    return "\n".join([*_head(recipe), *_tables(config, keys, own)]) + "\n"


def _head(recipe: StarterRecipe) -> Iterator[str]:
    seeds = "document" if recipe == "instruction" else "pair"
    yield f"# A run with the recipe `{recipe}`. A line of the seeds is a {seeds} as JSON."
    yield "# All keys and their meaning: streamsyn config"
    yield "# Look at the prompts:  streamsyn preview run.toml"
    yield "# Run, and resume:      streamsyn run run.toml --out runs/first"


def _tables(config: Config, keys: list[str], own: Mapping[str, Any]) -> Iterator[str]:
    for name, group in groupby(keys, key=lambda key: key.partition(".")[0]):
        section: Section = getattr(config, name)
        yield f"\n[{name}]"
        for key in (key.partition(".")[2] for key in group):
            meaning = " ".join(meanings(type(section)).get(key, "").split())
            sentence = _FIRST_SENTENCES.match(meaning)
            yield f"# {sentence[1] if sentence else meaning}"
            yield f"{key} = {toml_value(own.get(f'{name}.{key}', getattr(section, key)))}"
