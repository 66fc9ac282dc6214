"""`merge`: finished runs become one run directory, which is as one run would have written it."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from streamsyn.cli.main import cli
from streamsyn.errors import ConfigError, DirectoryInUse
from streamsyn.export.export_request import ExportRequest
from streamsyn.export.export_run import export
from streamsyn.pipeline.merge import MergeSummary, merge
from streamsyn.pipeline.verify import verify
from streamsyn.scoring.sidecar import Found, Sidecar
from streamsyn.sink.partitions import begin_partitions
from streamsyn.sink.rundir import RunDirectory, saved_config
from tests.builders import opened, reject, rows, sink
from tests.export.support import make_run, rows_of, scored


def test_runs_of_two_sites(tmp_path: Path) -> None:
    """Rows in turn with new numbers. Of what both have, that of the first is taken, the other is counted."""
    one, _ = make_run(tmp_path / "one", [*(scored(n) for n in range(6)), reject(0)])
    other, _ = make_run(
        tmp_path / "other",
        [*(scored(n, context=f"Else {n}. " * 9) for n in range(4, 20)), reject(0), reject(1)],
    )
    done = merge([one, other], tmp_path / "to")

    assert MergeSummary(2, {"contexts": 20, "rejects": 2, "samples": 20}, 3) == done
    problems, found = verify(tmp_path / "to")
    assert ([], [], done.counts) == (problems, found.notes, found.counts)
    contexts = rows(tmp_path / "to", "contexts")
    order = [0, 1, 2, 6, 3, 7, 4, 8, 5, *range(9, 20)]
    assert [f"seed-{number}" for number in order] == [row["seed_id"] for row in contexts]
    assert list(range(20)) == [row["seq"] for row in contexts]
    by_seed = {row["seed_id"]: row["context"] for row in contexts}
    assert by_seed["seed-4"].startswith("Text 4")
    assert by_seed["seed-6"].startswith("Else 6")
    assert ["bad.jsonl:0", "bad.jsonl:1"] == [row["origin"] for row in rows(tmp_path / "to", "rejects")]
    again = merge([one, other], tmp_path / "again")
    assert done == again
    assert rows(tmp_path / "to", "samples") == rows(tmp_path / "again", "samples")


def test_the_partitions_of_a_run_keep_their_order(tmp_path: Path) -> None:
    """An export of the merged run is that of its partitions, also of those that were taken up again."""
    partitions = begin_partitions(tmp_path / "run", 2)
    first, second = partitions.directories
    make_run(first, [*map(scored, range(2))])
    make_run(second, [*map(scored, range(10, 14))])
    partitions = partitions.with_ended(0).with_ended(1)
    partitions = partitions.with_next_round()
    make_run(first, [*map(scored, range(2, 7))])
    partitions.with_ended(1).with_ended(0)
    merge([tmp_path / "run"], tmp_path / "to")
    for root in ("run", "to"):
        export(ExportRequest(root=tmp_path / root, to=str(tmp_path / f"{root}-data")))

    assert 11 == len(rows_of(tmp_path / "to-data"))
    own = {row["id"]: row["context_seqs"][row["relevant_index"]] for row in rows_of(tmp_path / "to-data")}
    assert own == {
        row["id"]: row["context_seqs"][row["relevant_index"]] for row in rows_of(tmp_path / "run-data")
    }
    assert [] == verify(tmp_path / "to")[0]


def test_what_was_superseded_is_left_behind(tmp_path: Path) -> None:
    """Only outcomes that hold are taken, with what `score` found about them; the result can be retried."""
    root, config = make_run(tmp_path / "run", [scored(0), reject(0), reject(1)])
    with opened(root, config.sink) as log:
        log.add_retry(["not_a_seed"])
        log.append([scored(5, supersedes=0)])
        log.seal_outcomes()
        log.finish()
    [row] = [row for row in rows(root, "contexts") if row["seq"] == 0]
    sidecar = Sidecar(root)
    sidecar.add([Found(row, "leaks", {"contaminated": {"ngrams": 3}}, ["contaminated"])])
    sidecar.close()
    done = merge([root], tmp_path / "to")

    assert (2, 1) == (done.counts["contexts"], done.counts["rejects"])
    contexts = rows(tmp_path / "to", "contexts")
    assert all("supersedes" not in row for row in contexts)
    assert "contaminated" in contexts[0]["checks"]["flags"]
    assert [] == verify(tmp_path / "to")[0]
    assert saved_config(tmp_path / "to") == config


def test_runs_that_do_not_belong_together_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written, with what to do."""
    one, _ = make_run(tmp_path / "one", [scored(0)])
    other, _ = make_run(tmp_path / "other", [scored(1)], contexts_per_sample=5)
    open_run, _ = make_run(tmp_path / "open", [scored(2)], to_the_end=False)
    to = tmp_path / "to"

    with pytest.raises(ConfigError, match=r"assembly\.contexts_per_sample: 3 before, 5 now"):
        merge([one, other], to)
    with pytest.raises(ConfigError, match="open is not finished; run `streamsyn run --out"):
        merge([one, open_run], to)
    begin_partitions(tmp_path / "parts", 2)
    with pytest.raises(ConfigError, match="parts is not finished"):
        merge([tmp_path / "parts"], to)
    with pytest.raises(ConfigError, match="named twice"):
        merge([one, tmp_path / "other" / ".." / "one"], to)
    with pytest.raises(ConfigError, match="other exists; choose a new directory"):
        merge([one], other)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for name in (".", ".."):
        with pytest.raises(ConfigError, match="is a directory in use; choose a new one"):
            merge([one], Path(name))
    assert not to.exists()


def test_a_merge_that_was_killed_is_repeated(tmp_path: Path) -> None:
    """What it has left is removed, unless it goes on."""
    one, _ = make_run(tmp_path / "one", [scored(0), scored(1)])
    with opened(tmp_path / ".to.merging", sink()) as log:
        log.append([scored(7)])
    left = RunDirectory(tmp_path / ".to.merging")
    with pytest.raises(DirectoryInUse):
        merge([one], tmp_path / "to")
    left.close()
    result = CliRunner().invoke(cli, ["merge", str(one), "--to", str(tmp_path / "to")])

    assert 0 == result.exit_code, result.output
    assert f"{tmp_path / 'to'}: 2 contexts, 0 rejects, 2 samples of 1 runs\n" == result.stdout
    assert ["one", "to"] == sorted(path.name for path in tmp_path.iterdir())
