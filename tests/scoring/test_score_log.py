"""`score`: the contexts of a log are measured beside it, and every reader of scores finds them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest

from streamsyn.config.fingerprint import fingerprint
from streamsyn.config.loading import load
from streamsyn.errors import ConfigError, FleetGone
from streamsyn.export.export_request import ExportRequest
from streamsyn.export.export_run import export
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run
from streamsyn.pipeline.verify import verify
from streamsyn.report.run_metrics import RunMetrics
from streamsyn.scoring.examiner import Scores
from streamsyn.scoring.score_log import ScoreRequest, ScoreSummary, score
from streamsyn.scoring.sidecar import MEASURES, Found, Measure, Sidecar, measured, with_scores
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.simulator.timeline import Event, Timeline
from streamsyn.sink.rundir import RunDirectory, saved_config
from tests.builders import context, opened, rows, sealed_bytes

URL = "http://gpu-1:30000"
SEEDS = 20
CHECKED = [("checks.context_gain", True), ("checks.answerable", True), ("checks.near_duplicate", "flag")]
Settings = Sequence[tuple[str, Any]]


@pytest.fixture
def simulation() -> Simulation:
    """The server that writes and scores."""
    return Simulation(SimulatorConfig(cost_model="h100", faithful=0.5))


def write(root: Path, simulation: Simulation, settings: Settings = ()) -> Path:
    """A finished run."""
    seeds = root / "seeds.jsonl"
    lines = [
        {"instruction": f"Who kept light {n}?", "answer": f"Keeper Amund {n * 7919}."} for n in range(SEEDS)
    ]
    seeds.write_bytes(b"\n".join(map(orjson.dumps, lines)))
    servers = InProcessServers({URL: simulation}, {})
    base = [("seeds.sources", [{"path": str(seeds)}]), ("fleet.servers", [URL])]
    config = load(None, [*base, ("assembly.contexts_per_sample", 2), *settings])
    out = root / "out"
    request = RunRequest(config=config, out=out, connect=servers.connect, runner=servers.run, rng=Random(0))
    run(request)
    return out


def scored(
    out: Path,
    simulation: Simulation,
    settings: Settings = (),
    measures: Sequence[Measure] = MEASURES,
    timeline: Sequence[Event] = (),
    *,
    again: bool = False,
) -> ScoreSummary:
    """What comes of measuring it."""
    servers = InProcessServers({URL: simulation}, {URL: Timeline(list(timeline))} if timeline else {})
    saved = saved_config(out)
    assert saved is not None
    config = load(None, [*saved.model_dump(exclude_none=True).items(), *settings])
    return score(
        ScoreRequest(
            root=out,
            config=config,
            measures=measures,
            again=again,
            connect=servers.connect,
            runner=servers.run,
            rng=Random(0),
        )
    )


def test_a_log_is_measured_as_a_run_measures_what_it_writes(tmp_path: Path, simulation: Simulation) -> None:
    """The same scores and flags; the log is untouched, and report and export read them."""
    (tmp_path / "checked").mkdir()
    twin = Simulation(SimulatorConfig(cost_model="h100", faithful=0.5))
    checked = {row["seed_id"]: row for row in rows(write(tmp_path / "checked", twin, CHECKED), "contexts")}
    out = write(tmp_path, simulation)
    before = sealed_bytes(out)
    summary = scored(out, simulation)
    found = list(with_scores(out, rows(out, "contexts")))

    assert (SEEDS, True) == (summary.contexts, summary.is_final)
    assert {"gain": SEEDS, "answers": SEEDS, "duplicates": SEEDS} == summary.measured
    assert ["leaks: set checks.eval_sets to files of evaluation data"] == summary.skipped
    assert before == sealed_bytes(out)
    assert [] == verify(out)[0]
    for row in found:
        same = checked[row["seed_id"]]
        assert same["context"] == row["context"]
        names = ("context_gain", "nll_with", "nll_without", "scored_tokens", "answer_metric")
        assert [same["checks"][name] for name in names] == [row["checks"][name] for name in names]
        assert ("low_context_gain" in same["checks"]["flags"]) == (
            "low_context_gain" in row["checks"]["flags"]
        )
        assert set(same["checks"]) == set(row["checks"])
    metrics = RunMetrics(out)
    assert (SEEDS, SEEDS) == (metrics.all.gain.count, metrics.all.answered.count)
    low = sum("low_context_gain" in row["checks"]["flags"] for row in found)
    assert low == metrics.flags["low_context_gain"]
    settings = (("assembly.min_context_gain", 1000.0),)
    assert 0 == export(ExportRequest(root=out, to=str(tmp_path / "none"), settings=settings)).samples
    assert SEEDS == export(ExportRequest(root=out, to=str(tmp_path / "all"))).samples


def test_what_is_measured_is_not_measured_again(tmp_path: Path, simulation: Simulation) -> None:
    """Neither by a later `score`, nor where the run itself has measured it."""
    out = write(tmp_path, simulation, [("checks.context_gain", True)])
    scored(out, simulation, measures=["gain", "answers"])
    asked = simulation.stats.by_route["/v1/chat/completions"]
    again = scored(out, simulation)

    assert {"answers": SEEDS, "duplicates": SEEDS} == measured(out)
    assert {"duplicates": SEEDS} == again.measured
    assert asked == simulation.stats.by_route["/v1/chat/completions"]


def test_a_score_that_is_stopped_goes_on(
    tmp_path: Path, simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found is kept; the rest is measured later, each context once."""
    out = write(tmp_path, simulation)
    add: Callable[[Sidecar, Any], None] = Sidecar.add
    kept = 0

    def killing(sidecar: Sidecar, findings: list[Found]) -> None:
        nonlocal kept
        if kept == 5:
            raise KeyboardInterrupt
        kept += 1
        add(sidecar, findings)

    with monkeypatch.context() as patched:
        patched.setattr(Sidecar, "add", killing)
        with pytest.raises(KeyboardInterrupt):
            scored(out, simulation, measures=["gain"])
    assert {"gain": 5} == measured(out)
    assert {"gain": SEEDS - 5} == scored(out, simulation, measures=["gain"]).measured


def test_servers_that_go_away_end_it_resumably(tmp_path: Path, simulation: Simulation) -> None:
    """With the reason; what needs no server is measured."""
    out = write(tmp_path, simulation)
    with pytest.raises(FleetGone, match="give_up_s"):
        scored(out, simulation, [("fleet.give_up_s", 5.0)], timeline=[Event(0.0, die=True)])
    assert {"duplicates": SEEDS} == measured(out)


def test_other_settings_are_refused_until_all_is_measured_anew(
    tmp_path: Path, simulation: Simulation
) -> None:
    """Figures of different settings cannot be compared."""
    out = write(tmp_path, simulation)
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_bytes(orjson.dumps({"text": rows(out, "contexts")[3]["context"]}) + b"\n")
    sets = [("checks.eval_sets", [str(evaluation)])]
    scored(out, simulation, sets, ["leaks", "duplicates"])
    leaks = [row["seq"] for row in with_scores(out, rows(out, "contexts")) if "contaminated" in row["checks"]]
    assert 3 in leaks
    with pytest.raises(
        ConfigError, match=r"findings of duplicates with other settings \(checks\.similarity: 0\.8"
    ):
        scored(out, simulation, [("checks.similarity", 0.9)], ["duplicates"])
    anew = scored(out, simulation, [("checks.similarity", 0.9)], ["duplicates"], again=True)
    assert {"duplicates": SEEDS} == anew.measured
    assert {"duplicates": SEEDS, "leaks": SEEDS} == measured(out)


def log_of(root: Path, texts: Sequence[str]) -> None:
    """Log contexts with these texts behind those that are there."""
    config = load(None, [("fleet.servers", [URL])])
    directory = RunDirectory(root)
    directory.save(config.model_dump(mode="json"), fingerprint(config))
    directory.close()
    with opened(root, config.sink) as log:
        first = log.contexts.rows
        log.append([context(number, context=text) for number, text in enumerate(texts, first)])


def repeats(root: Path) -> list[str | None]:
    """The id of the context that each one repeats, if any."""
    found = with_scores(root, rows(root, "contexts"))
    return [(row["checks"].get("near_duplicate") or {}).get("id") for row in found]


def test_near_duplicates_are_compared_in_the_order_of_a_growing_log(
    tmp_path: Path, simulation: Simulation
) -> None:
    """The later one of a pair is flagged, also when the earlier one was compared by an earlier `score`."""
    text = " ".join(f"word{number}" for number in range(80))
    texts = [" ".join(f"{n}x{word}" for word in range(80)) for n in range(6)]
    texts[1] = texts[2] = texts[4] = text
    log_of(tmp_path, texts[:2])
    assert not scored(tmp_path, simulation, measures=["duplicates"]).is_final
    log_of(tmp_path, texts[2:4])
    scored(tmp_path, simulation, measures=["duplicates"])
    (tmp_path / "scores" / "duplicates.sqlite").unlink()  # it is derived
    log_of(tmp_path, texts[4:])
    scored(tmp_path, simulation, measures=["duplicates"])

    assert [None, None, "seed-1", None, "seed-1", None] == repeats(tmp_path)


def test_near_duplicates_are_the_same_when_they_are_looked_for_anew(
    tmp_path: Path, simulation: Simulation
) -> None:
    """An index that is ahead of the findings is not used: the second text is nearer to the third."""
    words = [f"word{number}" for number in range(600)]
    log_of(tmp_path, [" ".join(words[start : start + 400]) for start in (0, 100, 150)])
    settings = [("checks.similarity", 0.5)]
    scored(tmp_path, simulation, settings, measures=["duplicates"])
    first = repeats(tmp_path)
    scored(tmp_path, simulation, settings, measures=["duplicates"], again=True)

    assert [None, "seed-0", None] == first == repeats(tmp_path)


def test_findings_belong_to_a_text(tmp_path: Path) -> None:
    """A row that was written anew at the same place, after a loss of power, is measured anew."""
    lines = [orjson.loads(orjson.dumps(context(n))) | {"seq": n} for n in range(6)]
    sidecar = Sidecar(tmp_path)
    assert [0, 1, 2, 3, 4, 5] == [row["seq"] for row, _ in sidecar.missing(lines, ["leaks"])]
    sidecar.add([Found(lines[1], "leaks", {"contaminated": {"ngrams": 1}}, ["contaminated"])])
    assert [0, 2, 3, 4, 5] == [row["seq"] for row, _ in sidecar.missing(lines, ["leaks"])]
    other = [row | {"context": "written anew"} if row["seq"] == 1 else row for row in lines]
    assert 1 in [row["seq"] for row, _ in sidecar.missing(other, ["leaks"])]
    sidecar.close()

    merged = list(with_scores(tmp_path, lines))
    assert ["contaminated"] == merged[1]["checks"]["flags"]
    assert [row for row in lines if row["seq"] != 1] == [row for row in merged if row["seq"] != 1]
    assert other == list(with_scores(tmp_path, other))


def test_a_failed_measurement_is_tried_again_later(
    tmp_path: Path, simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves no finding."""
    out = write(tmp_path, simulation)

    async def failing(scores: Scores, findings: Any, question: Any, text: str) -> None:
        findings.flags.append("unscored")

    with monkeypatch.context() as patched:
        patched.setattr(Scores, "measure", failing)
        assert {} == scored(out, simulation, measures=["answers"]).measured
    assert {"answers": SEEDS} == scored(out, simulation, measures=["answers"]).measured
