"""`streamsyn init`: a short configuration to begin with, as TOML with comments."""

import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias

from streamsyn.config.fields import Section
from streamsyn.config.loading import Config, load
from streamsyn.config.toml_text import toml_value

StarterRecipe: TypeAlias = Literal["context", "sections", "instruction"]

_LENGTHS: Final[Mapping[StarterRecipe, tuple[str, ...]]] = MappingProxyType(
    {
        "context": ("recipe.target_words", "recipe.max_tokens"),
        "sections": ("recipe.target_tokens", "recipe.section_tokens"),
        "instruction": ("recipe.window_words", "recipe.max_tokens"),
    }
)
"""The two keys that decide how long a context of each recipe is."""
_KEYS: Final = (
    "run.max_reject_fraction",
    "seeds.sources",
    "recipe.use",
    "recipe.temperature",
    "checks.min_words",
    "checks.near_duplicate",
    "fleet.servers",
    "assembly.contexts_per_sample",
)
_OWN: Final[Mapping[str, Any]] = MappingProxyType(
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


def starter(recipe: StarterRecipe) -> str:
    """Return a configuration of ten keys for a recipe, each with its meaning; others have their defaults."""
    own = {**_OWN, "recipe.use": recipe}
    if recipe == "instruction":
        own["seeds.sources"] = [{"path": "documents.jsonl"}]
    order = {name: place for place, name in enumerate(Config.model_fields)}
    keys = sorted((*_KEYS, *_LENGTHS[recipe]), key=lambda key: order[key.partition(".")[0]])
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
            meaning = " ".join((type(section).model_fields[key].description or "").split())
            sentence = _FIRST_SENTENCES.match(meaning)
            yield f"# {sentence[1] if sentence else meaning}"
            yield f"{key} = {toml_value(own.get(f'{name}.{key}', getattr(section, key)))}"
