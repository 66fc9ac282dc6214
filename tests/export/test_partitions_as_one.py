"""A run with partitions read as one by `export`, `verify`, `report` and `status`."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from streamsyn.cli.main import cli
from streamsyn.errors import ConfigError
from streamsyn.export.export_request import ExportRequest
from streamsyn.export.export_run import export
from streamsyn.pipeline.status import status, status_lines
from streamsyn.pipeline.verify_joined import verify_joined
from streamsyn.report.run_metrics import RunMetrics
from streamsyn.sink.partitions import begin_partitions
from tests.builders import reject
from tests.export.support import make_run, rows_of, scored, tree

SIZES = (9, 14, 3)


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three partitions; no test writes to it."""
    return make_partitions(tmp_path_factory.mktemp("joined"))


def make_partitions(root: Path, *, twice: bool = False) -> Path:
    """Three partitions; a seed has outcomes in two of them if `twice`."""
    partitions = begin_partitions(root, len(SIZES))
    for at, directory in enumerate(partitions.directories):
        numbers = range(sum(SIZES[:at]) - (twice and at == 1), sum(SIZES[: at + 1]))
        make_run(directory, [*map(scored, numbers), reject(at)])
        partitions = partitions.with_ended(at)
    return root


def test_samples_have_distractors_of_all_partitions(joined: Path, tmp_path: Path) -> None:
    """In the order of the joined rows, with the same bytes each time, in this process or in others."""
    for name in ("one", "two"):
        summary = export(ExportRequest(root=joined, to=str(tmp_path / name)))
    rows = rows_of(tmp_path / "one")

    assert (26, 26) == (summary.contexts, summary.samples)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert any("distractors are of all partitions" in note for note in summary.notes)
    numbers = [0, 9, 23, 1, 10, 24, 2, 11, 25, 3, 12, 4]
    by_number = {f"seed-{number}": place for place, number in enumerate(numbers)}
    own = {row["seed_id"]: row["context_seqs"][row["relevant_index"]] for row in rows}
    assert by_number == {seed: own[seed] for seed in by_number}
    ends = [0, 9, 23, 26]
    first = {f"seed-{number}" for number in range(ends[0], ends[1])}
    others = {own[seed] for seed in own.keys() - first}
    assert any(others & set(row["context_seqs"]) for row in rows if row["seed_id"] in first)


def test_an_unfinished_partition_leaves_contexts_waiting(tmp_path: Path) -> None:
    """They may still get distractors of it."""
    partitions = begin_partitions(tmp_path / "run", 2)
    make_run(partitions.directories[0], [*map(scored, range(4))])
    make_run(partitions.directories[1], [*map(scored, range(4, 5))], to_the_end=False)
    summary = export(ExportRequest(root=tmp_path / "run", to=str(tmp_path / "data")))

    assert not summary.is_final
    assert 0 < summary.waiting
    flushed = export(ExportRequest(root=tmp_path / "run", to=str(tmp_path / "flushed"), flush=True))
    assert (5, 0) == (flushed.samples, flushed.waiting)


def test_partitions_that_have_not_begun(tmp_path: Path) -> None:
    """Whoever reads OUT, or repairs it, takes the others; without any, the first is named."""
    out = tmp_path / "run"
    partitions = begin_partitions(out, 3)
    with pytest.raises(ConfigError, match=r"partition-000 is not a run directory"):
        RunMetrics(out)
    make_run(partitions.directories[1], [*map(scored, range(4))])
    assert 4 == export(ExportRequest(root=out, to=str(tmp_path / "data"), flush=True)).samples
    assert 4 == RunMetrics(out).counts["contexts"]
    for command in (["verify", str(out), "--repair"], ["score", str(out), "--only", "duplicates"]):
        result = CliRunner().invoke(cli, command)
        assert 0 == result.exit_code, result.output
        assert not partitions.directories[0].exists()


def test_all_partitions_are_verified(joined: Path, tmp_path: Path) -> None:
    """Each as a run directory; no seed is in two; none has lost rows that were read."""
    found = verify_joined(joined)
    assert ([], 26, 3) == (found.problems, found.counts["contexts"], found.counts["rejects"])

    twice = verify_joined(make_partitions(tmp_path / "twice", twice=True))
    assert ["seed seed-8 has outcomes in partition-000 and in partition-001"] == twice.problems

    lost = make_partitions(tmp_path / "lost")
    (lost / "partition-002").rename(tmp_path / "aside")
    make_run(lost / "partition-002", [scored(23), scored(24)])
    assert "partitions.json: partition-002 had 3 contexts, and has 2" in verify_joined(lost).problems
    damaged = lost / "partition-001" / "contexts" / "part-000000.jsonl"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    [first, *_] = verify_joined(lost).problems
    assert first.startswith("partition-001/contexts/part-000000.jsonl: ")
    result = CliRunner().invoke(cli, ["verify", str(lost)])
    assert (1, True) == (result.exit_code, first in result.output)


def test_a_report_counts_all_partitions(joined: Path) -> None:
    """Contexts, rejects and samples."""
    metrics = RunMetrics(joined)

    assert {"contexts": 26, "rejects": 3, "samples": 26} == metrics.counts
    assert metrics.is_complete
    assert [] == metrics.notes


def test_the_status_of_all_partitions(joined: Path, tmp_path: Path) -> None:
    """Their sum, and each; it is finished when all have ended."""
    found = status(joined)

    assert ("finished", 26, 3, {"not_a_seed": 3}) == (
        found.state,
        found.contexts,
        found.rejects,
        found.reasons,
    )
    assert [9, 14, 3] == [part.contexts for part in found.partitions]
    assert "  partition-001: finished, 14 contexts, 1 rejects" in status_lines(found, 0.0)
    partitions = begin_partitions(tmp_path, 2)
    assert ("unfinished", 0) == (status(tmp_path).state, status(tmp_path).contexts)
    make_run(partitions.directories[1], [scored(1)])
    assert ("unfinished", 1) == (status(tmp_path).state, status(tmp_path).contexts)
