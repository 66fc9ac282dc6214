"""What would be sent, without a server."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from streamsyn.cli.preview import preview as preview_command
from streamsyn.config.loading import Config, load
from streamsyn.errors import ConfigError
from streamsyn.pipeline.preview import preview

LINES = [
    '{"id": "one", "task": "qa", "instruction": "When did it burn?", "answer": "In 1847."}',
    '{"instruction": "No answer"}',
    '{"id": "three", "instruction": "Who rowed?", "answer": "Nobody."}',
]


def lines_of(folder: Path, *settings: tuple[str, object]) -> Config:
    """A configuration that reads LINES."""
    path = folder / "seeds.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return load(None, [("seeds.sources", [{"path": str(path)}]), *settings])


def test_the_first_seeds(tmp_path: Path) -> None:
    """File and line, id, sampling parameters and both messages of each."""
    _, one, bad = preview(lines_of(tmp_path, ("recipe.target_words", 321)), 2)
    head, *rest = one.split("\n")
    assert f"=== {tmp_path}/seeds.jsonl:1: seed one, task qa (temperature=0.8, max_tokens=4096)" == head
    assert ["--- system", "--- user"] == [line for line in rest if line.startswith("---")]
    assert ["When did it burn?" in one, "In 1847." in one, "321" in one] == [True] * 3
    assert f"=== {tmp_path}/seeds.jsonl:2: would be rejected: not_a_seed: " == bad[: bad.index("field")]


def test_a_seed_cannot_control_the_terminal(tmp_path: Path) -> None:
    """Control characters are shown as escapes, in prompts and in what would be rejected."""
    path = tmp_path / "seeds.jsonl"
    path.write_text('{"instruction": "Go?\\u001b[2J", "answer": "Yes\\nno\\u009b2J"}\nbad \x1b[2J\n')
    shown = CliRunner().invoke(preview_command, ["--seeds", str(path)])
    assert 0 == shown.exit_code
    assert [True] * 3 == [text in shown.stdout for text in (r"Go?\x1b[2J", "Yes\nno", r"\x9b2J")]
    assert "\x1b" not in shown.stdout


def test_no_more_than_there_are(tmp_path: Path) -> None:
    """A limit beyond the last seed gives all seeds."""
    assert 1 + 3 == len(list(preview(lines_of(tmp_path), 99)))


def test_what_follows_the_first_request(tmp_path: Path) -> None:
    """Only the first request is known; for a recipe with more steps, the later ones are described."""
    _, one, _ = preview(lines_of(tmp_path, ("recipe.use", "sections")), 2)
    assert "First make an outline of the document: 8 short headings" in one
    assert one.endswith(
        "--- then about 8 sections of at most 1024 tokens, up to 8000 in all, "
        "each asked for in the same conversation\n"
    )
    _, plain, _ = preview(lines_of(tmp_path), 2)
    assert "--- then" not in plain


def test_documents(tmp_path: Path) -> None:
    """The window that would be sent and the document's length; a document that is too short is rejected."""
    path = tmp_path / "books.jsonl"
    text = " ".join(f"word{number}" for number in range(200))
    path.write_text(f'{{"context": "{text}", "id": "long"}}\n{{"context": "Short."}}\n{{"text": "x"}}\n')
    settings = [("recipe.use", "instruction"), ("recipe.window_words", 60)]
    long, short, bad = preview(load(None, [("seeds.sources", [{"path": str(path)}]), *settings]), 9)

    assert long.startswith(f"=== {path}:1: seed long, task books, a document of 200 words (temperature=0.8")
    assert 60 == sum(word.startswith("word") for word in long.split("--- user")[1].split())
    fewer = "would be rejected: too_short: the document has 1 words, fewer than checks.min_words = 50"
    assert f"=== {path}:2: {fewer}\n" == short
    missing = "field 'context' is missing; fields: text; set seeds.fields.context"
    assert bad.startswith(f"=== {path}:3: would be rejected: not_a_seed: {missing}")


def test_nothing_is_written(tmp_path: Path) -> None:
    """The folder is unchanged."""
    config = lines_of(tmp_path)
    list(preview(config, 99))
    assert ["seeds.jsonl"] == [path.name for path in tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("key", "value"),
    [("recipe.use", "none"), ("recipe.template", "no.j2"), ("seeds.sources", [{"path": "no"}])],
)
def test_what_cannot_be_used(tmp_path: Path, key: str, value: object) -> None:
    """Refused with the same error as by `run`."""
    with pytest.raises(ConfigError):
        list(preview(lines_of(tmp_path, (key, value)), 1))
