"""Whole runs whose contexts are scored, in virtual time: who is asked, what is kept, what a resume needs."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest

from streamsyn.config.loading import load
from streamsyn.config.sections import ChecksSection
from streamsyn.errors import ConfigError
from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.fleet.transport import Reply, Transport
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run
from streamsyn.pipeline.setup import is_examined
from streamsyn.pipeline.summary import RunSummary, closing_lines
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.simulator.timeline import Event, Timeline
from tests.builders import rows

WRITERS = ["http://writer-1:1", "http://writer-2:1"]
SCORERS = ["http://scorer-1:1", "http://scorer-2:1"]
SCORED = [("checks.context_gain", True), ("checks.answerable", True)]
Settings = Sequence[tuple[str, Any]]


class Fleet:
    """Simulated servers: those that write, and those that score."""

    def __init__(self, **config: Any) -> None:
        batching = {"cost_model": "h100", **config}
        self.simulations = {
            **{url: Simulation(SimulatorConfig(faithful=0.5, **batching)) for url in WRITERS},
            **{url: Simulation(SimulatorConfig(model="judge", **batching)) for url in SCORERS},
        }

    def asked(self, urls: list[str], route: str) -> int:
        """Requests that came to these servers."""
        return sum(self.simulations[url].stats.by_route[route] for url in urls)


def seeds(root: Path, number: int) -> Path:
    """A file of so many seeds."""
    path = root / "narrativeqa.jsonl"
    lines = [
        {"instruction": f"Who kept light {n}?", "answer": f"Keeper Amund {n * 7919}."} for n in range(number)
    ]
    path.write_bytes(b"\n".join(map(orjson.dumps, lines)))
    return path


def ran(
    root: Path,
    fleet: Fleet,
    settings: Settings,
    timelines: dict[str, Timeline] | None = None,
    number: int = 60,
) -> RunSummary:
    """What comes of a run into `root`/out."""
    servers = InProcessServers(fleet.simulations, timelines or {})
    overrides = [
        ("seeds.sources", [{"path": str(seeds(root, number))}]),
        ("fleet.servers", WRITERS),
        ("assembly.contexts_per_sample", 2),
        *settings,
    ]
    request = RunRequest(
        config=load(None, overrides),
        out=root / "out",
        connect=servers.connect,
        runner=servers.run,
        rng=Random(0),
        show_progress=False,
        preflight=False,
    )
    return run(request)


def test_contexts_are_scored_where_they_are_written(tmp_path: Path) -> None:
    """Each context has its scores; their cost is counted apart from that of writing."""
    fleet = Fleet()
    summary = ran(tmp_path, fleet, [*SCORED, ("recipe.contexts_per_seed", 2)])

    found = rows(tmp_path / "out", "contexts")
    counters = summary.counters
    assert (120, 0) == (summary.contexts, summary.rejects)
    for row in found:
        assert {"context_gain", "answer_score", "closed_book_score", "scoring"} <= row["checks"].keys()
        assert (1, 0) == (len(row["attempts"]), row["wasted_tokens"])
        assert row["completion_tokens"] == sum(attempt["completion_tokens"] for attempt in row["attempts"])
    holds = [row["checks"]["context_gain"] for row in found if row["answer"] in row["context"]]
    lacks = [row["checks"]["context_gain"] for row in found if row["answer"] not in row["context"]]
    assert min(len(holds), len(lacks)) > 30
    assert min(holds) > max(lacks), "gain tells which contexts hold the answer"
    # 60 seeds of two drafts: with each context, and without any once a seed; two more to see whether it can
    assert 120 + 60 + 2 == fleet.asked(WRITERS, "/generate")
    assert 120 + 120 + 60 == fleet.asked(WRITERS, "/v1/chat/completions")
    assert 0 == fleet.asked(SCORERS, "/tokenize")
    assert counters.scoring_prompt_tokens == sum(row["checks"]["scoring"]["prompt_tokens"] for row in found)
    assert (120, 0, 0) == (counters.scored, counters.unscored, counters.wasted_tokens)
    assert counters.useful_tokens == sum(row["completion_tokens"] for row in found)
    [line] = [line for line in closing_lines(summary) if line.startswith("  scoring")]
    assert "120 contexts, 0 of them without a score" in line
    assert 120 == summary.as_dict()["scored"]


def test_other_servers_can_score(tmp_path: Path) -> None:
    """All requests about one context go to one server of its fleet; run.json names the model."""
    fleet = Fleet()
    settings = [*SCORED, ("scoring.servers", SCORERS)]
    summary = ran(tmp_path, fleet, settings)

    assert 60 == summary.contexts
    assert {"simulated"} == {row["model"] for row in rows(tmp_path / "out", "contexts")}
    assert 0 == fleet.asked(WRITERS, "/generate")
    assert 2 == fleet.asked(WRITERS, "/tokenize"), "each once, for the end of its prompts"
    assert 60 == fleet.asked(WRITERS, "/v1/chat/completions")
    assert 120 + 2 == fleet.asked(SCORERS, "/generate")
    told = {server["server"]: server for server in summary.servers()}
    assert {*WRITERS, *SCORERS} == told.keys()
    assert sum(told[url]["cached_tokens"] for url in SCORERS) > 0
    saved = orjson.loads((tmp_path / "out/run.json").read_bytes())["fingerprint"]
    assert ("simulated", "judge") == (saved["model"], saved["scoring.model"])

    assert 60 == ran(tmp_path, fleet, settings, number=60).contexts, "the same again has nothing to do"
    with pytest.raises(ConfigError, match=r"scoring\.model: 'judge' before, 'simulated' now"):
        ran(tmp_path, fleet, SCORED, number=70)


def test_one_server_may_do_both(tmp_path: Path) -> None:
    """A server in both fleets is reported twice, under two names."""
    summary = ran(tmp_path, Fleet(), [*SCORED, ("scoring.servers", WRITERS[:1])], number=8)

    names = [server["server"] for server in summary.servers()]
    assert [*WRITERS, f"{WRITERS[0]} (scoring)"] == names


def test_a_run_without_servers_that_score_stops(tmp_path: Path) -> None:
    """When the scoring servers are gone for `fleet.give_up_s` the run stops, and a later run finishes it."""
    settings = [*SCORED, ("scoring.servers", SCORERS), ("fleet.give_up_s", 20.0), ("fleet.max_in_flight", 4)]
    gone = {url: Timeline([Event(20.0, die=True)]) for url in SCORERS}

    stopped = ran(tmp_path, Fleet(), settings, gone, number=400)
    assert stopped.stopped is not None
    assert "scoring server" in stopped.stopped
    assert 0 < stopped.contexts < 400
    finished = ran(tmp_path, Fleet(), settings, number=400)

    assert (None, 400) == (finished.stopped, finished.contexts)
    assert all("context_gain" in row["checks"] for row in rows(tmp_path / "out", "contexts"))


def test_rejects_by_score_have_their_reason(tmp_path: Path) -> None:
    """A threshold makes rejects; their tokens count as wasted, without those of scoring."""
    summary = ran(
        tmp_path, Fleet(), [*SCORED, ("checks.reject_gain_below", 0.5), ("run.max_reject_fraction", 1.0)]
    )

    rejects = rows(tmp_path / "out", "rejects")
    assert {"low_context_gain"} == {row["reason"] for row in rejects}
    assert summary.counters.wasted_tokens == sum(row["wasted_tokens"] for row in rejects) > 0
    assert {1} == {len(row["attempts"]) for row in rejects}
    assert 60 == summary.counters.scored == summary.contexts + summary.rejects


def test_repeats_and_leaks_over_two_runs(tmp_path: Path) -> None:
    """What a later run writes is compared with what the log holds; other evaluation sets are another run."""
    leak = tmp_path / "eval.jsonl"
    leak.write_bytes(
        orjson.dumps({"context": "one two three four five six seven eight nine ten " * 4}) + b"\n"
    )
    settings = [("checks.near_duplicate", "flag"), ("checks.eval_sets", [str(leak)])]
    for number in (20, 40):
        fleet = Fleet()  # which begins its texts anew: the second run writes what the first one wrote
        summary = ran(tmp_path, fleet, [*settings, ("fleet.servers", WRITERS[:1])], number=number)
    found = rows(tmp_path / "out", "contexts")

    assert 40 == summary.contexts
    assert not any("near_duplicate" in row["checks"] for row in found[:20])
    assert all("near_duplicate" in row["checks"]["flags"] for row in found[20:])
    assert 0 == fleet.asked(WRITERS, "/generate")
    assert (tmp_path / "out/index/duplicates.sqlite").exists()
    leak.write_bytes(
        orjson.dumps({"context": "ten nine eight seven six five four three two one " * 4}) + b"\n"
    )
    with pytest.raises(ConfigError, match=r"checks\.eval_sets"):
        ran(tmp_path, Fleet(), settings, number=60)


class _Plain:
    """A server that writes, and has no other route."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def exchange(self, method: str, path: str, **options: Any) -> Reply:
        """404 where there is nothing."""
        if path in ("/tokenize", "/generate"):
            return Reply(404, b'{"detail":"Not Found"}')
        return await self._transport.exchange(method, path, **options)


def test_servers_that_cannot_score_are_found_at_the_start(tmp_path: Path) -> None:
    """A configuration error before the first seed; `checks.answerable` alone does not need these routes."""
    servers = InProcessServers(Fleet().simulations)

    @asynccontextmanager
    async def connect(spec: ServerSpec) -> AsyncIterator[Transport]:
        async with servers.connect(spec) as transport:
            yield _Plain(transport)

    def request(name: str, *checks: str) -> RunRequest:
        overrides = [("seeds.sources", [{"path": str(seeds(tmp_path, 4))}]), ("fleet.servers", WRITERS)]
        config = load(None, [*overrides, *((f"checks.{check}", True) for check in checks)])
        return RunRequest(
            config=config, out=tmp_path / name, connect=connect, runner=servers.run, show_progress=False
        )

    with pytest.raises(ConfigError, match=r"checks\.context_gain: scoring needs SGLang: http://writer-1"):
        run(request("gain", "context_gain", "answerable"))
    assert [] == rows(tmp_path / "gain", "rejects")
    assert 4 == run(request("answers", "answerable")).contexts


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([("scoring.servers", ["scorer"])], r"scoring\.servers: scorer is not a valid URL"),
        ([("scoring.servers", [SCORERS[0], WRITERS[0]])], r"different models: .*scoring\.model"),
        ([("scoring.servers", SCORERS), ("scoring.model", "x")], r"scoring\.model: .* not x"),
        ([("scoring.model", "x")], r"scoring\.model: 'x' is not among .*simulated"),
    ],
)
def test_errors_name_a_key_of_scoring(tmp_path: Path, settings: Settings, said: str) -> None:
    """Not the key of `fleet` with the same meaning."""
    with pytest.raises(ConfigError, match=said):
        ran(tmp_path, Fleet(), [*SCORED, *settings])


def test_nothing_is_examined_by_default() -> None:
    """Each check must be turned on."""
    assert not is_examined(ChecksSection())
    for check in (
        {"context_gain": True},
        {"answerable": True},
        {"near_duplicate": "flag"},
        {"eval_sets": ["a"]},
    ):
        assert is_examined(ChecksSection.model_validate(check))
