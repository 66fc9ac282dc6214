"""Rejects that are asked again: what holds afterwards, for every reader, whatever kills the retry."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest

from streamsyn.config.loading import load
from streamsyn.errors import ConfigError, SinkError
from streamsyn.export.export_request import ExportRequest
from streamsyn.export.export_run import export
from streamsyn.pipeline.reopened import may_change, without_missing_sources
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run
from streamsyn.pipeline.summary import RunSummary
from streamsyn.pipeline.verify import repair, verify
from streamsyn.records import RejectReason
from streamsyn.report.run_metrics import RunMetrics
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.sink.log import RunLog
from streamsyn.sink.manifest import Manifest
from streamsyn.sink.rundir import read_run_json, saved_config
from streamsyn.sink.snapshot import Snapshot, holding_rejects
from streamsyn.trainer.sources.run_samples import RunSamples
from tests.builders import COMPRESSIONS, rows

URL = "http://gpu-1:30000"
STRICT = [("checks.min_words", 100_000), ("checks.max_words", 200_000)]
"""No answer is long enough."""
SEEDS = 12
Settings = Sequence[tuple[str, Any]]


def seed(number: int) -> dict[str, Any]:
    return {"id": f"s{number}", "instruction": f"Who kept light {number}?", "answer": f"Keeper {number}."}


def write(path: Path, lines: Sequence[Any]) -> Path:
    path.write_bytes(b"".join(one if isinstance(one, bytes) else orjson.dumps(one) + b"\n" for one in lines))
    return path


def played(root: Path, settings: Settings = (), retry: Sequence[RejectReason] = ()) -> RunSummary:
    """A run into `root`/out, with the settings saved there and others."""
    servers = InProcessServers({URL: Simulation(SimulatorConfig(cost_model="h100"))}, {})
    saved = saved_config(root / "out")
    kept = [] if saved is None else list(saved.model_dump(exclude_none=True).items())
    base = [("fleet.servers", [URL]), ("assembly.contexts_per_sample", 2), ("recipe.tries", 1)]
    config = load(None, [*(kept or base), *settings])
    request = RunRequest(
        config=without_missing_sources(config) if retry else config,
        out=root / "out",
        connect=servers.connect,
        runner=servers.run,
        rng=Random(0),
        show_progress=False,
        preflight=False,
        retry=retry,
    )
    return run(request)


def rejected(root: Path, settings: Settings = STRICT, lines: Sequence[Any] = ()) -> RunSummary:
    """A run all of whose seeds are rejected."""
    path = write(root / "seeds.jsonl", lines or [seed(number) for number in range(SEEDS)])
    return played(root, [("seeds.sources", [{"path": str(path)}]), *settings])


LENIENT = [("checks.min_words", 5)]
ALL = tuple(RejectReason)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_rejects_that_are_asked_again_become_contexts_for_every_reader(
    tmp_path: Path, compression: str
) -> None:
    """Counts, report, export, `verify` and the samples agree; the rows of the rejects stay as they are."""
    mirror = tmp_path / "mirror"
    settings = [*STRICT, ("sink.compression", compression), ("sink.mirror", str(mirror))]
    first = rejected(tmp_path, settings)
    before = rows(tmp_path / "out", "rejects")
    again = played(tmp_path, LENIENT, ALL)
    out = tmp_path / "out"

    assert (0, SEEDS) == (first.contexts, first.rejects)
    assert (SEEDS, 0, SEEDS) == (again.contexts, again.rejects, again.samples)
    assert before == rows(out, "rejects")
    found = [(row["id"], row["supersedes"]) for row in rows(out, "contexts")]
    assert sorted((row["id"], row["seq"]) for row in before) == sorted(found)
    for directory in (out, mirror):
        assert [] == verify(directory)[0]
        assert [] == list(holding_rejects(Snapshot(directory)))
    metrics = RunMetrics(out)
    assert (SEEDS, 0, SEEDS) == (metrics.counts["contexts"], metrics.counts["rejects"], metrics.superseded)
    assert metrics.is_complete
    export(ExportRequest(root=out, to=str(tmp_path / "data")))
    assert re.search(r"seeds without a context \| +0 ", (tmp_path / "data" / "README.md").read_text())
    source = RunSamples(out)
    assert SEEDS == source.total()
    source.close()
    final = Manifest(out / "manifest.jsonl").final
    assert final is not None
    assert (SEEDS, SEEDS) == (final["rejects"], final["superseded"])


def test_a_reject_that_is_rejected_again_is_superseded_by_the_later_one(tmp_path: Path) -> None:
    """One reject a seed holds, the latest; a third try supersedes that one."""
    rejected(tmp_path)
    second = played(tmp_path, [("checks.min_words", 90_000)], ALL)
    holding = list(holding_rejects(Snapshot(tmp_path / "out")))

    assert (0, SEEDS) == (second.contexts, second.rejects)
    assert 2 * SEEDS == len(rows(tmp_path / "out", "rejects"))
    assert all("90000" in row["detail"] for row in holding)
    assert [] == verify(tmp_path / "out")[0]
    third = played(tmp_path, LENIENT, ALL)
    assert (SEEDS, 0) == (third.contexts, third.rejects)
    assert {row["seq"] for row in holding} == {
        row["supersedes"] for row in rows(tmp_path / "out", "contexts")
    }
    assert [] == verify(tmp_path / "out")[0]


def test_only_rejects_of_the_given_reason_are_asked_again(tmp_path: Path) -> None:
    """The others hold, and nothing is asked for them."""
    rejected(tmp_path, lines=[*map(seed, range(3)), b"no json\n"])
    none = played(tmp_path, LENIENT, [RejectReason.TIMEOUT])
    some = played(tmp_path, LENIENT, [RejectReason.TOO_SHORT])

    assert (0, 0) == (none.contexts, none.counters.outcomes)
    assert (3, 1) == (some.contexts, some.rejects)
    assert [RejectReason.INVALID_JSON] == [
        row["reason"] for row in holding_rejects(Snapshot(tmp_path / "out"))
    ]


def test_the_log_holds_the_seeds_of_rejects_when_their_source_is_gone(tmp_path: Path) -> None:
    """Instruction, answer and metadata are in the row."""
    rejected(tmp_path, lines=[{**seed(number), "page": number} for number in range(3)])
    (tmp_path / "seeds.jsonl").unlink()
    again = played(tmp_path, LENIENT, ALL)

    assert (3, 0) == (again.contexts, again.rejects)
    assert [0, 1, 2] == sorted(row["metadata"]["page"] for row in rows(tmp_path / "out", "contexts"))


def test_a_line_that_was_not_a_seed_is_asked_once_it_can_be_read(tmp_path: Path) -> None:
    """The reject of its place is superseded, by each of its drafts; an unchanged line stays rejected."""
    lines = [seed(0), b"not yet\n", b"never\n"]
    rejected(tmp_path, [*LENIENT, ("recipe.contexts_per_seed", 2)], lines)
    write(tmp_path / "seeds.jsonl", [seed(0), seed(1), b"never\n"])
    again = played(tmp_path, (), ALL)

    assert (4, 1) == (again.contexts, again.rejects)
    by_id = {row["id"]: row.get("supersedes") for row in rows(tmp_path / "out", "contexts")}
    assert {"s0": None, "s0#1": None, "s1": 0, "s1#1": 0} == by_id
    assert ["seeds.jsonl:3"] == [
        Path(row["origin"]).name for row in holding_rejects(Snapshot(tmp_path / "out"))
    ]
    assert [] == verify(tmp_path / "out")[0]


def test_a_line_that_now_repeats_a_finished_seed_stays_rejected(tmp_path: Path) -> None:
    """Its seed has an outcome: a second one would be doubled."""
    rejected(tmp_path, LENIENT, [seed(0), b"not yet\n"])
    write(tmp_path / "seeds.jsonl", [seed(0), seed(0)])
    again = played(tmp_path, (), ALL)

    assert (1, 1, 0) == (again.contexts, again.rejects, again.counters.outcomes)
    assert [] == verify(tmp_path / "out")[0]


def test_documents_are_read_again_from_their_source(tmp_path: Path) -> None:
    """A reject does not hold the document."""
    text = " ".join(f"word{number}" for number in range(60))
    strict = [("recipe.use", "instruction"), ("checks.min_words", 100)]
    rejected(tmp_path, strict, [{"id": "d", "context": text}])
    again = played(tmp_path, [("checks.min_words", 10)], ALL)
    found = rows(tmp_path / "out", "contexts") + list(holding_rejects(Snapshot(tmp_path / "out")))

    assert 1 == again.counters.outcomes
    assert [("d", 0)] == [(row["id"], row["supersedes"]) for row in found]
    assert [] == verify(tmp_path / "out")[0]


def test_settings_that_other_rows_depend_on_cannot_be_changed(tmp_path: Path) -> None:
    """The keys are named, and nothing is written; replaced settings are kept with their rows."""
    rejected(tmp_path)
    before = (tmp_path / "out" / "run.json").read_bytes()
    with pytest.raises(
        ConfigError, match=r"a retry cannot change .* \(assembly\.contexts_per_sample: 2 before"
    ):
        played(tmp_path, [("assembly.contexts_per_sample", 3), *LENIENT], ALL)
    assert before == (tmp_path / "out" / "run.json").read_bytes()
    assert [] == Manifest(tmp_path / "out" / "manifest.jsonl").retries

    played(tmp_path, LENIENT, ALL)
    saved = read_run_json(tmp_path / "out")
    assert saved is not None
    (replaced,) = saved["replaced"]
    assert {"contexts": 0, "rejects": SEEDS} == replaced["rows_before"]
    assert (100_000, 5) == (
        replaced["fingerprint"]["checks.min_words"],
        saved["fingerprint"]["checks.min_words"],
    )
    assert [] == list(filter(may_change(tmp_path / "out"), ["seeds.fields.answer", "run.seed", "recipe.use"]))


@pytest.mark.parametrize("rows_before", [0, 1, 5, SEEDS - 1])
def test_a_retry_that_is_killed_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_before: int
) -> None:
    """Rejects without a new outcome hold; a plain run asks for the rest, once, with the changed settings."""
    rejected(tmp_path)
    append, written = RunLog.append, 0

    def killing(log: RunLog, outcomes: Any) -> Any:
        nonlocal written
        done = append(log, outcomes[: max(0, rows_before - written)])
        written += len(done)
        if written == rows_before:
            raise SinkError("killed")
        return done

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "append", killing)
        with pytest.raises(SinkError, match="killed"):
            played(tmp_path, [*LENIENT, ("fleet.max_in_flight", 2)], ALL)
    assert SEEDS - rows_before == len(list(holding_rejects(Snapshot(tmp_path / "out"))))
    assert [] == verify(tmp_path / "out")[0]
    (tmp_path / "out" / "index" / "finished.sqlite").unlink()  # it is derived

    resumed = played(tmp_path)
    assert SEEDS - rows_before == resumed.counters.outcomes
    assert (SEEDS, 0) == (resumed.contexts, resumed.rejects)
    assert [] == verify(tmp_path / "out")[0]
    idle = played(tmp_path)
    assert (0, 0) == (idle.counters.outcomes, idle.rejects)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_outcomes_that_a_loss_of_power_takes_leave_their_rejects_holding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, share: float
) -> None:
    """The open shard is cut anywhere: what it held is asked again, once. (No samples are made of it.)"""
    rejected(tmp_path, [*STRICT, ("sink.compression", compression), ("assembly.write", False)])
    append, appended = RunLog.append, 0

    def killing(log: RunLog, outcomes: Any) -> Any:
        nonlocal appended
        if appended >= 6:
            raise SinkError("killed")
        appended += len(outcomes)
        return append(log, outcomes)

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "append", killing)
        with pytest.raises(SinkError, match="killed"):
            played(tmp_path, [*LENIENT, ("fleet.max_in_flight", 2)], ALL)
    (shard,) = (tmp_path / "out" / "contexts").glob("part-*.open")
    os.truncate(shard, int(shard.stat().st_size * share))
    left = len(rows(tmp_path / "out", "contexts"))
    assert left <= appended
    assert SEEDS - left == len(list(holding_rejects(Snapshot(tmp_path / "out"))))

    resumed = played(tmp_path)
    assert (SEEDS, 0, SEEDS - left) == (resumed.contexts, resumed.rejects, resumed.counters.outcomes)
    assert [] == verify(tmp_path / "out")[0]


def test_a_torn_line_of_the_manifest_is_no_retry(tmp_path: Path) -> None:
    """The rejects hold as before, and the next retry asks for them."""
    rejected(tmp_path)
    log = RunLog(tmp_path / "out", saved_config(tmp_path / "out").sink)  # type: ignore[union-attr]
    log.add_retry([str(reason) for reason in ALL])
    log.close()
    manifest = tmp_path / "out" / "manifest.jsonl"
    os.truncate(manifest, manifest.stat().st_size - 20)

    idle = played(tmp_path)
    assert (0, SEEDS, 0) == (idle.contexts, idle.rejects, idle.counters.outcomes)
    assert (SEEDS, 0) == (played(tmp_path, LENIENT, ALL).contexts, played(tmp_path).rejects)
    assert [] == verify(tmp_path / "out")[0]


def test_a_run_goes_on_with_a_retry_only_under_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings before the retry are refused, by key; the retry itself may be repeated with others."""
    rejected(tmp_path)

    def killed(log: RunLog, outcomes: Any) -> None:
        raise SinkError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "append", killed)
        with pytest.raises(SinkError, match="killed"):
            played(tmp_path, LENIENT, [RejectReason.TOO_SHORT])
    with pytest.raises(ConfigError, match=r"checks\.min_words: 5 before, 100000 now"):
        played(tmp_path, STRICT)
    again = played(tmp_path, [("checks.min_words", 6)], [RejectReason.TIMEOUT])
    assert (SEEDS, 0) == (again.contexts, again.rejects)
    saved = read_run_json(tmp_path / "out")
    assert saved is not None
    found = [one["fingerprint"]["checks.min_words"] for one in saved["replaced"]]
    assert ([100_000, 5], 6) == (found, saved["fingerprint"]["checks.min_words"])


def test_a_kill_before_the_retry_is_recorded_leaves_the_rejects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings are saved first, so that no reject is asked again with the old ones."""
    rejected(tmp_path)

    def killed(log: RunLog, reasons: Any) -> None:
        raise SinkError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "add_retry", killed)
        with pytest.raises(SinkError, match="killed"):
            played(tmp_path, LENIENT, ALL)
    idle = played(tmp_path)
    assert (0, SEEDS, 0) == (idle.contexts, idle.rejects, idle.counters.outcomes)
    assert (SEEDS, 0) == (
        played(tmp_path, (), ALL).contexts,
        len(list(holding_rejects(Snapshot(tmp_path / "out")))),
    )


def test_verify_finds_an_outcome_that_no_retry_asked_for(tmp_path: Path) -> None:
    """A second outcome without a retry, and one that names the wrong reject."""
    rejected(tmp_path)
    played(tmp_path, LENIENT, ALL)
    out = tmp_path / "out"
    manifest = out / "manifest.jsonl"
    whole = manifest.read_bytes()
    manifest.write_bytes(b"".join(line for line in whole.splitlines(True) if b'"retry"' not in line))

    problems, _ = verify(out)
    assert SEEDS == len(problems)
    assert all("which no retry has asked again for it" in problem for problem in problems)
    manifest.write_bytes(whole)
    assert [] == verify(out)[0]
    repair(out)
    assert [] == verify(out)[0]
