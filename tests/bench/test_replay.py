"""The recorded work of a run, asked for again."""

import math
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest
from click.testing import CliRunner, Result

from streamsyn.bench.measured_run import RunToMeasure, measure
from streamsyn.bench.measurement import Load, Measurement
from streamsyn.bench.replay import (
    RecordedAnswer,
    forced,
    open_replay,
    recorded_draft,
)
from streamsyn.cli.main import cli
from streamsyn.config.loading import load
from streamsyn.errors import ConfigError
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run
from streamsyn.records import Draft, Request, Seed
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.sink.snapshot import Snapshot

URL = "http://gpu:30000"


def fleet_of(**fields: Any) -> InProcessServers:
    """One new simulated H100."""
    return InProcessServers({URL: Simulation(SimulatorConfig(cost_model="h100", **fields))})


def recorded_run(
    tmp_path: Path, servers: InProcessServers, settings: Mapping[str, Any], *, preflight: bool = True
) -> list[dict[str, Any]]:
    """The rows of a run of six seeds into `tmp_path`/out."""
    path = tmp_path / "seeds.jsonl"
    rows = [{"id": f"s{n}", "instruction": f"What of {n}?", "answer": f"It is {n}."} for n in range(6)]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    fixed = {
        "seeds.sources": [{"path": str(path)}],
        "fleet.servers": [URL],
        "assembly.write": False,
        "checks.max_repetition": 1.0,
    }
    config = load(None, {**fixed, **settings}.items())
    run(
        RunRequest(
            config=config,
            out=tmp_path / "out",
            connect=servers.connect,
            runner=servers.run,
            rng=Random(0),
            show_progress=False,
            preflight=preflight,
        )
    )
    snapshot = Snapshot(tmp_path / "out")
    return [row for kind in ("contexts", "rejects") for part in snapshot.parts[kind] for row in part.rows()]


def replayed(tmp_path: Path, servers: InProcessServers, *, with_log: bool = False) -> Measurement:
    """Replay the run in virtual time."""
    config = load(None, {"fleet.servers": [URL], "sink.sync_rows": 1}.items())
    return measure(
        RunToMeasure(
            config=config,
            load=Load(with_log=with_log),
            limit_s=math.inf,
            folder=tmp_path,
            replay=tmp_path / "out",
            simulated=lambda: servers,
            handles_signals=False,
        )
    )


def lengths(found: Measurement | list[dict[str, Any]]) -> list[int]:
    """The tokens of each answer, of a run's rows or of a measurement, in order of length."""
    if isinstance(found, Measurement):
        return sorted(one.completion_tokens for one in found.requests)
    return sorted(attempt["completion_tokens"] for row in found for attempt in row["attempts"])


@pytest.mark.parametrize("cache_tokens", [None, 0], ids=["radix cache", "no cache"])
def test_sections_share_prefixes_as_in_the_run(tmp_path: Path, cache_tokens: int | None) -> None:
    """As many requests and tokens, and within 5 % the prompt tokens sent for each one computed."""
    sections = {"recipe.use": "sections", "recipe.target_tokens": 4000}
    rows = recorded_run(tmp_path, fleet_of(words=580, cache_tokens=cache_tokens), sections)
    sent, cached = (sum(row[name] for row in rows) for name in ("prompt_tokens", "cached_tokens"))
    factor = sent / (sent - cached)
    again = fleet_of(words=580, seed=7, cache_tokens=cache_tokens)  # on its own it would write other lengths

    found = replayed(tmp_path, again)

    assert found.is_complete
    assert found.replayed is not None
    assert lengths(rows) == lengths(found)
    assert pytest.approx(sent, rel=0.02) == sum(one.prompt_tokens for one in found.requests)
    assert factor == found.replayed.recorded_factor
    assert pytest.approx(factor, rel=0.05) == found.replayed.factor
    assert factor > 10 if cache_tokens is None else factor == 1
    assert ["context"] * 6 == [draft.outcome for draft in found.drafts]


def test_discarded_answers_and_rejects_are_asked_for_again(tmp_path: Path) -> None:
    """A seed whose answers all failed costs the servers as much as before, and so does each failed try."""
    servers = fleet_of(words=300, faults={"short": 0.6}, seed=3)
    rows = recorded_run(tmp_path, servers, {"run.max_reject_fraction": 1.0})

    found = replayed(tmp_path, fleet_of(words=300))

    assert {"context", "reject"} == {draft.outcome for draft in found.drafts}
    assert len(lengths(rows)) > len(found.drafts) == 6
    assert lengths(rows) == lengths(found)


def test_a_replay_may_have_a_log(tmp_path: Path) -> None:
    """It is a log of its own, on the disk and deleted; the recorded run and its sources are not touched."""
    settings = {"assembly.write": True, "assembly.contexts_per_sample": 2, "run.max_reject_fraction": 1.0}
    rows = recorded_run(tmp_path, fleet_of(words=300, faults={"short": 0.6}, seed=3), settings)
    (tmp_path / "seeds.jsonl").unlink()  # the drafts come from the log
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    found = replayed(tmp_path, fleet_of(words=300), with_log=True)

    assert found.is_complete
    assert lengths(rows) == lengths(found)
    assert {"context", "reject"} == {draft.outcome for draft in found.drafts}
    assert found.ticks[-1].disk_s > 0
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert [tmp_path / "out"] == list(tmp_path.iterdir())


def test_documents_come_from_the_sources_of_the_run(tmp_path: Path) -> None:
    """The log has the questions about documents, but not the documents."""
    path = tmp_path / "documents.jsonl"
    rows = [{"id": f"d{n}", "context": f"The geese of year {n} flew north. " * 30} for n in range(3)]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    settings = {
        "recipe.use": "instruction",
        "seeds.sources": [{"path": str(path)}],
        "checks.min_words": 1,
        "recipe.contexts_per_seed": 2,
    }
    recorded = recorded_run(tmp_path, fleet_of(), settings)

    found = replayed(tmp_path, fleet_of())

    prompts = [one.prompt_tokens for one in found.requests]
    assert sorted(row["prompt_tokens"] for row in recorded) == sorted(prompts)
    path.write_bytes(orjson.dumps(rows[0]) + b"\n")
    fewer = open_replay(tmp_path / "out")
    assert 2 == len(list(fewer.drafts()))
    assert {"its document is not in the sources": 4} == fewer.left_out


def test_the_command_compares_two_fleets_on_the_work_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same requests take longer without a radix cache."""
    monkeypatch.chdir(tmp_path)
    recorded_run(tmp_path, fleet_of(words=580), {"recipe.use": "sections", "recipe.target_tokens": 2000})

    def bench(*arguments: str) -> Result:
        return CliRunner().invoke(cli, ["bench", *arguments])

    for name, settings in (("with", ""), ("without", ":cache_tokens=0")):
        result = bench("--replay", "out", "--simulate", f"1xcpu{settings}", "--out", name)
        assert 0 == result.exit_code, result.output
        assert "6 contexts on 1 GPU" in result.output
    found = bench("--compare", "with", "without")

    assert 4 == found.exit_code
    assert "regression: seconds for the replay" in found.output


def test_what_cannot_be_replayed(tmp_path: Path) -> None:
    """A directory without a run, and a run without an answer."""
    with pytest.raises(ConfigError, match="not a run directory"):
        open_replay(tmp_path)
    refusing = fleet_of(faults={"refuse": 1.0})
    recorded_run(tmp_path, refusing, {"run.max_reject_fraction": 1.0}, preflight=False)
    replay = open_replay(tmp_path / "out")

    with pytest.raises(ConfigError, match="no answer"):
        list(replay.drafts())

    assert {"no answer came": 6} == replay.left_out


def test_servers_that_refuse_what_is_replayed_are_a_mistake(tmp_path: Path) -> None:
    """One line with their answer, as in the preflight of a run."""
    recorded_run(tmp_path, fleet_of(), {})

    with pytest.raises(ConfigError, match=f"{URL} answered 400"):
        replayed(tmp_path, fleet_of(faults={"refuse": 1.0}))


def test_answers_are_matched_with_the_steps_they_became() -> None:
    """`attempts` has all tries, `steps` what was kept."""
    attempts = [
        {"completion_tokens": 7, "error": None},
        {"completion_tokens": 3, "error": "ServerTimeout: 60 s"},
        {"completion_tokens": 5, "error": None},
        {"completion_tokens": 9, "error": None},
    ]
    steps = [
        {"completion_tokens": 7, "prompt_tokens": 10, "cached_tokens": 1, "finish_reason": "length"},
        {"completion_tokens": 9, "prompt_tokens": 30, "cached_tokens": 16, "finish_reason": "stop"},
    ]

    found = recorded_draft(Draft(Seed("s", "t", "i", "a", "")), {"attempts": attempts, "steps": steps})

    first = RecordedAnswer(7, is_kept=True, finish_reason="length", prompt_tokens=10, cached_tokens=1)
    last = RecordedAnswer(9, is_kept=True, prompt_tokens=30, cached_tokens=16)
    assert (first, RecordedAnswer(5), last) == found.answers


def test_nothing_else_ends_an_answer() -> None:
    """Neither stop words nor a second limit; a body that is sent as it is gets the same limit."""
    sampling = {"temperature": 0.8, "stop": ["\n"], "max_completion_tokens": 9}
    body = {"messages": [], **sampling}

    found = forced(Request([], sampling, body=body), 50)

    assert {"temperature": 0.8, "max_tokens": 50, "ignore_eos": True} == found.sampling
    assert {"messages": [], "temperature": 0.8, "max_tokens": 50, "ignore_eos": True} == found.body
