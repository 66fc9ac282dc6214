"""The preflight: what would fail for every seed ends a new run before its first seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from streamsyn.config.loading import load
from streamsyn.errors import ConfigError
from streamsyn.pipeline.preflight import sampled_requests
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run
from streamsyn.pipeline.summary import RunSummary
from streamsyn.recipes.registry import load_recipe
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.telemetry import Counters
from tests.builders import rows

GOOD = [{"instruction": f"Who kept light {n}?", "answer": f"Keeper {n}."} for n in range(6)]


class Case:
    """Runs in virtual time at simulated servers."""

    def __init__(self, root: Path, *servers: SimulatorConfig) -> None:
        self.root = root
        urls = [f"http://gpu-{number}:30000" for number in range(len(servers) or 1)]
        self.simulations = [Simulation(config) for config in servers or (SimulatorConfig(),)]
        self.servers = InProcessServers(dict(zip(urls, self.simulations, strict=True)))
        self.keys: dict[str, Any] = {"fleet.servers": urls, "assembly.contexts_per_sample": 2}

    def run(self, *sources: Sequence[dict[str, Any]], preflight: bool = True, **keys: Any) -> RunSummary:
        """Run with one file for each source."""
        paths = [self.root / f"seeds-{number}.jsonl" for number in range(len(sources))]
        for path, lines in zip(paths, sources, strict=True):
            path.write_bytes(b"\n".join(map(orjson.dumps, lines)))
        named = {name.replace("__", "."): value for name, value in keys.items()}
        settings = {"seeds.sources": [{"path": str(path)} for path in paths], **self.keys, **named}
        request = RunRequest(
            config=load(None, settings.items()),
            out=self.root / "out",
            connect=self.servers.connect,
            runner=self.servers.run,
            show_progress=False,
            preflight=preflight,
        )
        return run(request, RunSummary(request.out, Counters()))

    @property
    def requests(self) -> int:
        """Chat requests that the servers have had."""
        return sum(simulation.stats.requests for simulation in self.simulations)


def test_a_good_run_asks_once_more_and_logs_nothing_of_it(tmp_path: Path) -> None:
    case = Case(tmp_path)
    summary = case.run(GOOD)
    assert summary.contexts == len(GOOD)
    assert case.requests == len(GOOD) + 1
    assert len(rows(tmp_path / "out", "contexts")) == len(GOOD)
    assert summary.counters.wasted_tokens > 0


def test_a_run_that_resumes_is_not_checked(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.run(GOOD[:3])
    before = case.requests
    case.run(GOOD)
    assert case.requests == before + 3


def test_a_prompt_that_no_server_takes(tmp_path: Path) -> None:
    """Two servers and two prompts are tried, the text of the server is quoted, and no seed is used up."""
    case = Case(tmp_path, SimulatorConfig(context_tokens=2000), SimulatorConfig(context_tokens=2000))
    with pytest.raises(
        ConfigError, match=r"every seed would be rejected: http://gpu-\d:30000 answered 400.*--no-preflight"
    ):
        case.run(GOOD)
    assert not (tmp_path / "out" / "run.json").exists()
    assert case.run(GOOD, recipe__max_tokens=100).contexts == len(GOOD)


def test_one_server_with_a_fault_of_its_own(tmp_path: Path) -> None:
    case = Case(tmp_path, SimulatorConfig(context_tokens=2000), SimulatorConfig())
    assert case.run(GOOD).stopped is None


@pytest.mark.parametrize("fault", ["http_500", "queue_full", "bad_json"])
def test_a_server_that_fails_is_not_a_mistake(tmp_path: Path, fault: str) -> None:
    """The run starts, and waits for it or rejects by its own rules."""
    case = Case(tmp_path, SimulatorConfig(faults={fault: 0.5}))
    case.run(GOOD, fleet__max_attempts=20)
    assert (tmp_path / "out" / "run.json").exists()


def test_an_answer_that_takes_long_is_accepted(tmp_path: Path) -> None:
    """It is aborted, and counts among the unfinished answers."""
    case = Case(tmp_path, SimulatorConfig(latency_ms=60_000))
    summary = case.run(GOOD[:2])
    assert summary.contexts == 2
    (server,) = summary.servers()
    assert server["unfinished"] == 1


def test_a_source_without_any_seed_is_named(tmp_path: Path) -> None:
    """Also beside one that is fine; what is wrong with its first row, and the key to set."""
    with pytest.raises(
        ConfigError,
        match=r"none of the first 2 rows of .*seeds-1.jsonl can be used: .*seeds-1.jsonl:1: .*seeds.fields",
    ):
        Case(tmp_path).run(GOOD, [{"frage": "Wer?", "antwort": "Niemand."}] * 2)


def test_a_source_with_some_bad_rows_is_fine(tmp_path: Path) -> None:
    summary = Case(tmp_path).run([{"frage": "Wer?"}] * 50 + GOOD, run__max_reject_fraction=1.0)
    assert (summary.contexts, summary.rejects) == (len(GOOD), 50)


def test_without_it_nothing_is_checked(tmp_path: Path) -> None:
    case = Case(tmp_path)
    summary = case.run([{"frage": "Wer?"}] * 2, preflight=False)
    assert summary.rejects == 2
    assert case.requests == 0


def test_a_template_that_needs_a_field_that_no_row_has(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% block user %}{{ instruction }} {{ answer }} {{ metadata['place'] }}{% endblock %}"
    )
    with pytest.raises(ConfigError, match=r"none of the first 6 rows"):
        Case(tmp_path).run(GOOD, recipe__template=str(template))


def test_documents_that_are_all_too_short(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"too_short.*checks.min_words"):
        Case(tmp_path).run([{"context": "Too short."}] * 3, recipe__use="instruction")


def test_a_window_beyond_the_models_context_length(tmp_path: Path) -> None:
    case = Case(tmp_path, SimulatorConfig(context_tokens=8192))
    with pytest.raises(ConfigError, match=r"set recipe.window_tokens = 8192"):
        case.run(GOOD, recipe__use="sections", recipe__target_tokens=16_000)


def test_a_pipe_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """An example stands for its seeds, so that the server is asked all the same."""
    monkeypatch.setattr("streamsyn.pipeline.preflight.SeedReader", None)
    config = load(None, [("seeds.sources", [{"path": "-"}])])
    (request,) = sampled_requests(config, load_recipe(config.recipe, config.checks))
    assert "harbour master" in request.messages[-1]["content"]
