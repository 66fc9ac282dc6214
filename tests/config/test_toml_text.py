"""The configuration as TOML: all of it, and a short one to begin with."""

import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsyn.cli.main import cli
from streamsyn.config.loading import Config, known_keys, load
from streamsyn.config.toml_text import StarterRecipe, as_toml, starter
from streamsyn.errors import ConfigError

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
OWN = {"messages", "model", "n", "rid", "stream", "stream_options"}
"""What `recipe.sampling` may not name, and property tests come upon, since they read it in the code."""
VALUE = st.recursive(
    TEXT | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    sampling=st.dictionaries(TEXT.filter(lambda name: name not in OWN), VALUE, max_size=4),
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


@pytest.mark.parametrize("recipe", get_args(StarterRecipe))
def test_a_starter_has_ten_keys_with_their_meaning(tmp_path: Path, recipe: StarterRecipe) -> None:
    """It loads, and each key has a comment above it."""
    text = starter(recipe)
    path = tmp_path / "run.toml"
    path.write_text(text)
    keys = [(name, key) for name, table in tomllib.loads(text).items() for key in table]
    lines = text.splitlines()

    assert recipe == load(path).recipe.use
    assert 10 == len(keys)
    assert 50 > len(lines)
    for _, key in keys:
        at = next(number for number, line in enumerate(lines) if line.startswith(f"{key} = "))
        assert lines[at - 1].startswith("# ")
        assert lines[at - 1].endswith(".")


def test_init_does_not_overwrite(tmp_path: Path) -> None:
    """A file that exists stays as it is; a folder that does not exist is named."""
    path = tmp_path / "run.toml"
    first = CliRunner().invoke(cli, ["init", str(path)])
    written = path.read_text()
    second = CliRunner().invoke(cli, ["init", str(path), "--recipe", "sections"])
    nowhere = CliRunner().invoke(cli, ["init", str(tmp_path / "no" / "run.toml")])

    assert 0 == first.exit_code
    assert written == path.read_text()
    assert isinstance(second.exception, ConfigError)
    assert f"{path} exists" in str(second.exception)
    assert isinstance(nowhere.exception, ConfigError)
    assert "No such file or directory" in str(nowhere.exception)
