"""What would be sent, and what such a run takes, without a server."""

import re
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest
from click.testing import CliRunner

from streamsyn.cli.main import cli
from streamsyn.cli.preview import preview as preview_command
from streamsyn.config.loading import Config, load
from streamsyn.errors import ConfigError
from streamsyn.pipeline.preview import Terms, estimate, measure, preview, tokens_of
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from tests.builders import context, opened, rows

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


URL = "http://gpu-1:30000"


def config_of(root: Path, seeds: int, **recipe: Any) -> Config:
    """A configuration of so many seeds."""
    path = root / "seeds.jsonl"
    lines = [{"instruction": f"Who kept light {n}?", "answer": f"Keeper {n}."} for n in range(seeds)]
    path.write_bytes(b"\n".join(map(orjson.dumps, lines)))
    settings = [(f"recipe.{key}", value) for key, value in recipe.items()]
    return load(None, [("seeds.sources", [{"path": str(path)}]), ("fleet.servers", [URL]), *settings])


def figures(config: Config, terms: Terms) -> dict[str, float]:
    """The first number of each line, by its name."""
    _, *lines = estimate(config, terms)
    return {
        line[2:14].strip(): float(match[0].replace(",", ""))
        for line in lines
        if (match := re.search(r"\d[\d,.]*", line))
    }


def played(root: Path, config: Config, words: int) -> list[dict[str, Any]]:
    """The contexts of a run on a server that writes so many words, of 1.75 tokens each."""
    servers = InProcessServers({URL: Simulation(SimulatorConfig(cost_model="h100", words=words))}, {})
    request = RunRequest(
        config=config, out=root / "out", connect=servers.connect, runner=servers.run, rng=Random(0)
    )
    run(request)
    return rows(root / "out", "contexts")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [({"target_words": 600}, 455), ({"use": "sections", "target_tokens": 4000, "section_tokens": 512}, 2000)],
)
def test_an_estimate_is_near_what_a_run_takes(tmp_path: Path, recipe: dict[str, Any], words: int) -> None:
    """Tokens in and out of both kinds of recipes, before anything is asked."""
    config = config_of(tmp_path, 12, **recipe)
    said = figures(config, Terms(tokens_per_s=100.0, price_in=1e6, price_out=0.0))
    contexts = played(tmp_path, config, words)
    taken_in, taken_out = (
        sum(row[f"{name}_tokens"] for row in contexts) for name in ("prompt", "completion")
    )

    assert sum(len(row["steps"]) for row in contexts) == pytest.approx(said["requests"], rel=0.3)
    assert taken_in == pytest.approx(said["tokens in"], rel=0.3)
    assert taken_out == pytest.approx(said["tokens out"], rel=0.3)
    assert said["tokens in"] == pytest.approx(said["price"], abs=1)


def test_an_earlier_run_gives_tokens_and_rate(tmp_path: Path) -> None:
    """As its log has them; one without contexts cannot be measured."""
    config = config_of(tmp_path, 12, target_words=600)
    contexts = played(tmp_path, config, 300)
    found = measure(tmp_path / "out")
    text = "\n".join(estimate(config, Terms(like=tmp_path / "out")))

    assert sum(row["completion_tokens"] for row in contexts) / 12 == found.draft.completion_tokens
    assert f"as 12 contexts of {tmp_path / 'out'}" in text
    assert f"at {found.tokens_per_s:,.0f} output tokens/s (measured in" in text
    with pytest.raises(ConfigError, match="has no contexts to measure"):
        measure(tmp_path / "nothing")


def test_invented_answers_that_fail_a_check_are_asked_for_once(tmp_path: Path) -> None:
    """Tries are not known before a run; nor is a pause between two runs part of an earlier rate."""
    config = config_of(tmp_path, 4)
    strict = config.checks.model_copy(update={"min_words": 15_000})
    assert 4 == figures(config.model_copy(update={"checks": strict}), Terms())["requests"]
    with opened(tmp_path / "paused", config.sink) as log:
        log.append([context(number, written_at=at) for number, at in enumerate((10.0, 11.0, 5000.0, 5001.0))])
    assert 3 * 10 / 2.0 == measure(tmp_path / "paused").tokens_per_s


def test_seeds_are_counted_and_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly where they are few; by the share that was read where they are many."""
    config = config_of(tmp_path, 5000, contexts_per_seed=2)
    assert next(estimate(config, Terms())).startswith("5,000 seeds, 10,000 drafts")
    limited = config.model_copy(update={"seeds": config.seeds.model_copy(update={"limit": 70})})
    assert next(estimate(limited, Terms())).startswith("70 seeds, 140 drafts")
    monkeypatch.setattr("streamsyn.pipeline.preview._COUNTED", 1000)
    about = re.match(r"about ([\d,]+) seeds", next(estimate(config, Terms())))
    assert about is not None
    assert 5000 == pytest.approx(int(about[1].replace(",", "")), rel=0.5)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    """Lines that are not seeds, a rate that is missing, and options that need --estimate."""
    config = config_of(tmp_path, 3)
    with (tmp_path / "seeds.jsonl").open("ab") as file:
        file.write(b"\nno json\n")
    lines = list(estimate(config, Terms()))
    assert "  not seeds   1 of the first 4 lines would be rejected" in lines
    assert any("--tokens-per-s N, or --like DIR" in line for line in lines)
    done = CliRunner().invoke(cli, ["preview", "--seeds", str(tmp_path / "seeds.jsonl"), "--price-in", "1"])
    assert "--price-in needs --estimate" == str(done.exception)
    said = CliRunner().invoke(cli, ["preview", "--seeds", str(tmp_path / "seeds.jsonl"), "--estimate"])
    assert said.output.startswith("3 seeds, 3 drafts")


def test_tokens_in_any_script() -> None:
    """Scripts without spaces have about a token a character."""
    assert 3 == tokens_of("twelve chars")
    assert 6 <= tokens_of("\u706f\u5854\u7684\u5b88\u62a4\u8005") <= 8
