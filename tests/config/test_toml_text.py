"""The configuration as a file: it explains itself, and reads back as it was."""

import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsyn.config.loading import Config, known_keys, load
from streamsyn.config.toml_text import as_toml

FULL: dict[str, Any] = {
    "run": {"seed": 7, "max_reject_fraction": 0.25},
    "seeds": {
        "sources": [{"path": "a b.jsonl", "weight": 0.5}, {"path": "-", "task": 'the "new" one'}],
        "fields": {"instruction": "question"},
        "limit": 10,
    },
    "recipe": {
        "sampling": {"top_p": 0.9, "stop": ["\n\n", "END"], "logit_bias": {"15": -1.5}, "min_p": 1e-07},
        "template": "prompts/own.j2",
        "tasks": {"qa": {"target_words": 100}, "multi doc.qa": {"template": "x.j2"}, "": {}},
    },
    "fleet": {"servers": ["http://one:1", "http://two:2"], "model": "org/model"},
    "sink": {"compression": "zstd", "sync_interval_s": 1e22},
    "assembly": {"write": False, "target_tokens": 32_000, "tasks": {"qa": {"family": "single_doc_qa"}}},
}


def read_back(text: str) -> Config:
    """The configuration in `text`."""
    return Config.model_validate(tomllib.loads(text))


@pytest.mark.parametrize("tree", [{}, FULL])
def test_it_reads_back_as_it_was(tree: dict[str, Any], tmp_path: Path) -> None:
    """Defaults and everything else, and the file's text is the same again."""
    config = Config.model_validate(tree)
    text = as_toml(config)
    (tmp_path / "run.toml").write_text(text)
    assert config == load(tmp_path / "run.toml")
    assert text == as_toml(read_back(text))


@pytest.mark.parametrize("tree", [{}, FULL])
def test_every_key_has_its_meaning_above_it(tree: dict[str, Any]) -> None:
    """Each key and each section stands under a comment; one without a value is a comment itself."""
    lines = as_toml(Config.model_validate(tree)).splitlines()
    for above, line in pairwise(lines):
        if line and not line.startswith("#"):
            assert above.startswith("# "), line


def test_every_key_is_there() -> None:
    """With its section, set or not."""
    section, found = "", set()
    for line in as_toml(Config()).splitlines():
        name = line.removeprefix("# ").partition(" =")[0]
        if line.startswith("["):
            section = line.strip("[]")
        elif line.endswith(" =") or (" =" in line and not line.startswith("#")):
            found.add(f"{section}.{name}")
    expected = {key.partition(".*")[0] for key in known_keys()}
    below = {key for key in expected if any(key.startswith(f"{other}.") for other in expected)}
    assert expected - below == found  # a value stands in place of what could be below it


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
VALUE = st.recursive(
    TEXT | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    sampling=st.dictionaries(TEXT.filter(lambda name: name != "n"), VALUE, max_size=4),
    tasks=st.dictionaries(TEXT, st.none(), max_size=3),
    path=TEXT,
)
def test_any_value_reads_back(sampling: dict[str, Any], tasks: dict[str, None], path: str) -> None:
    """Whatever characters stand in names and texts, whatever is nested in what."""
    tree = {
        "recipe": {"sampling": sampling, "tasks": {task: {"target_words": 5} for task in tasks}},
        "seeds": {"sources": [{"path": path, "task": path}]},
    }
    config = Config.model_validate(tree)
    assert config == read_back(as_toml(config))
