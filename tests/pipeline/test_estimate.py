"""What `preview --estimate` says a run would take, and what such a run takes."""

import re
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest
from click.testing import CliRunner

from streamsyn.cli.main import cli
from streamsyn.config.loading import Config, load
from streamsyn.errors import ConfigError
from streamsyn.pipeline.estimate import Terms, estimate, measure, tokens_of
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from tests.builders import context, opened, rows

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
    monkeypatch.setattr("streamsyn.pipeline.estimate._COUNTED", 1000)
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
