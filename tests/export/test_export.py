"""`export`: each sample is exported once, in any format, with the same bytes each time."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.errors import ConfigError, SinkError
from streamsyn.export import formats, log_reader
from streamsyn.export.export_request import COMPRESSIONS, ExportRequest, ExportSummary
from streamsyn.export.export_run import export
from streamsyn.export.formats import ShardWriter
from streamsyn.export.log_reader import SCHEMA, LogReader
from streamsyn.export.splits import Split
from streamsyn.export.target import Target
from streamsyn.records import Outcome, Sample
from streamsyn.sink.log import RunLog
from tests.builders import reject, rows
from tests.examples import examples
from tests.export.support import make_run, rows_of, scored, tree

FORMATS = [(form, codec) for form, codecs in COMPRESSIONS.items() for codec in codecs]
OUTCOMES: list[Outcome] = [*(scored(n) for n in range(40)), reject(0), reject(1)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; no test writes to it."""
    return make_run(tmp_path_factory.mktemp("run"), OUTCOMES)[0]


def exported(root: Path, to: Path | str, **given: Any) -> ExportSummary:
    return export(ExportRequest(root=root, to=str(to), **given))


def as_samples(some: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fields of each row that a sample in the log has."""
    return [{field.name: row[field.name] for field in fields(Sample)} for row in some]


def samples_in(root: Path) -> list[dict[str, Any]]:
    return as_samples(rows(root, "samples"))


# The rows


@pytest.mark.parametrize(("form", "codec"), FORMATS)
def test_rows_are_those_of_the_run(run: Path, tmp_path: Path, form: str, codec: str) -> None:
    """With the run's own settings, the rows in every format equal `samples/`, in its order."""
    summary = exported(run, tmp_path / "out", format=form, compression=codec, shard_rows=7)

    assert samples_in(run) == as_samples(rows_of(tmp_path / "out"))
    assert (40, 40, 6, True) == (summary.samples, summary.contexts, summary.files, summary.is_final)


def test_a_row_has_all_of_a_sample() -> None:
    """Every field of Sample is a column."""
    assert {field.name for field in fields(Sample)} <= set(SCHEMA.names)


def test_a_row_has_the_scores_of_its_relevant_context(run: Path, tmp_path: Path) -> None:
    """The scores are those of the relevant context; one that was not measured is null."""
    exported(run, tmp_path)

    for row in rows_of(tmp_path):
        number = int(row["id"].removeprefix("seed-"))
        assert row["context_seqs"][row["relevant_index"]] == number
        assert row["context_gain"] == number / 10 - 1
        assert (row["answer_score"], row["closed_book_score"], row["model"]) == (0.5, None, "model")
        assert row["flags"] == (["truncated"] if number % 5 == 0 else [])


def test_settings_override_those_of_the_run(run: Path, tmp_path: Path) -> None:
    """A file's section first, then single keys; what is not named stays as in the run."""
    config = tmp_path / "c.toml"
    config.write_text("[run]\nseed = 9\n[assembly]\ncontexts_per_sample = 5\nposition = 0.0\n")
    exported(run, tmp_path / "a", config=config)
    exported(run, tmp_path / "b", config=config, settings=[("assembly.contexts_per_sample", 2)])

    first, second = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert {(5, 0)} == {(len(row["context_seqs"]), row["relevant_index"]) for row in first}
    assert {(2, 0)} == {(len(row["context_seqs"]), row["relevant_index"]) for row in second}


def test_only_keys_of_assembly_can_be_set(run: Path, tmp_path: Path) -> None:
    """Keys of other sections are refused, unknown ones as well."""
    with pytest.raises(ConfigError, match=r"recipe\.use"):
        exported(run, tmp_path, settings=[("recipe.use", "sections")])
    with pytest.raises(ConfigError, match=r"assembly\.position"):
        exported(run, tmp_path, settings=[("assembly.positon", 0)])
    assert [] == list(tmp_path.iterdir())


def test_contexts_that_are_left_out_are_counted(run: Path, tmp_path: Path) -> None:
    """They get no row, and the summary counts them by reason."""
    summary = exported(run, tmp_path, settings=[("assembly.min_context_gain", 0.95)])

    assert 20 == summary.samples == len(rows_of(tmp_path))
    assert 20 == summary.left_out.total()


def test_each_epoch_draws_differently(run: Path, tmp_path: Path) -> None:
    """There is a row for each context and epoch; the first ones equal an export of one epoch."""
    once = exported(run, tmp_path / "a")
    twice = exported(run, tmp_path / "b", epochs=2)

    found = rows_of(tmp_path / "b")
    assert (40, 80) == (once.samples, twice.samples)
    assert rows_of(tmp_path / "a") == found[:40]
    assert [0] * 40 + [1] * 40 == [row["epoch"] for row in found]
    assert found[40]["context_seqs"] != found[0]["context_seqs"]


def test_a_limit_keeps_the_first(run: Path, tmp_path: Path) -> None:
    """The first rows equal those of an export without a limit, and a note says that there may be more."""
    summary = exported(run, tmp_path, limit=7)

    assert samples_in(run)[:7] == as_samples(rows_of(tmp_path))
    assert any("the first 7" in note for note in summary.notes)


def test_templates_are_those_of_the_run(tmp_path: Path) -> None:
    """The template's file may have changed or moved since; a different one can be given."""
    template = tmp_path / "own.j2"
    template.write_text("Old {{ contexts[0] }} {{ instruction }}")
    root, _ = make_run(tmp_path / "run", OUTCOMES, template=template)
    template.write_text("New {{ contexts[0] }} {{ instruction }}")
    exported(root, tmp_path / "a")
    exported(root, tmp_path / "b", settings=[("assembly.template", str(template))])

    assert samples_in(root) == as_samples(rows_of(tmp_path / "a"))
    assert {"New"} == {row["messages"][0]["content"][:3] for row in rows_of(tmp_path / "b")}


def test_prompts_of_another_version_are_noted(tmp_path: Path) -> None:
    """Packaged prompts may change with the version: rows then differ from the run's samples."""
    root, _ = make_run(tmp_path / "run", OUTCOMES[:6])
    path = root / "run.json"
    saved = orjson.loads(path.read_bytes())
    saved["fingerprint"]["assembly.prompts"] = "of another version"
    del saved["fingerprint"]["assembly.max_similarity"]
    path.write_bytes(orjson.dumps(saved))
    notes = exported(root, tmp_path / "out").notes

    assert any("assembly.prompts" in note and "the version of streamsyn" in note for note in notes)


def test_a_resumed_run_is_flushed_where_its_streams_ended(tmp_path: Path) -> None:
    """A run that was given more seeds later flushed at its first end; so does an export."""
    root, _ = make_run(tmp_path / "run", OUTCOMES[:4])
    make_run(root, OUTCOMES[4:])
    exported(root, tmp_path / "out")

    assert samples_in(root) == as_samples(rows_of(tmp_path / "out"))


# Runs that are not finished


def test_an_unfinished_run_gives_what_is_certain(tmp_path: Path) -> None:
    """Contexts that wait for distractors have no row, except with `flush`."""
    root, _ = make_run(tmp_path / "run", OUTCOMES[:8], to_the_end=False)
    summary = exported(root, tmp_path / "a")
    flushed = exported(root, tmp_path / "b", flush=True)
    make_run(root, OUTCOMES[8:])

    certain = rows_of(tmp_path / "a")
    assert samples_in(root)[: len(certain)] == as_samples(certain)
    assert (8, False) == (summary.samples + summary.waiting, summary.is_final)
    assert 0 < summary.waiting < 8
    assert (8, 0) == (flushed.samples, flushed.waiting)
    assert any("not finished" in note for note in summary.notes)


def test_a_run_may_be_writing(tmp_path: Path) -> None:
    """A log that is open elsewhere, with an open shard and half a line at its end, can be exported."""
    root, config = make_run(tmp_path / "run", OUTCOMES[:20], to_the_end=False)
    log = RunLog(root, config.sink)
    try:
        log.append(OUTCOMES[20:30])
        with next((root / "contexts").glob("*.open")).open("ab") as file:
            file.write(b'{"seq":30,"id"')
        summary = exported(root, tmp_path / "out")
    finally:
        log.close()

    assert 30 == summary.contexts


def test_a_run_without_contexts(tmp_path: Path) -> None:
    """In every format there is a card and nothing else."""
    root, _ = make_run(tmp_path / "run", [reject(0)])

    for form in COMPRESSIONS:
        summary = exported(root, tmp_path / form, format=form, splits=["task"])
        assert (0, 0) == (summary.samples, summary.files)
        assert {"README.md", "export.json"} == set(tree(tmp_path / form))
        assert "holds no context yet" in (tmp_path / form / "README.md").read_text()


def test_a_damaged_log_is_refused(tmp_path: Path) -> None:
    """A missing shard or row is one line, and no card is written."""
    root, _ = make_run(tmp_path / "run", OUTCOMES)
    path = root / "contexts/part-000001.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 1])
    with pytest.raises(SinkError, match=r"part-000001.*streamsyn verify"):
        exported(root, tmp_path / "a")
    path.unlink()
    with pytest.raises(SinkError, match=r"part-000001.*streamsyn verify"):
        exported(root, tmp_path / "b")

    assert not (tmp_path / "a/README.md").exists()


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    """It is refused before anything is written."""
    with pytest.raises(ConfigError, match=r"no run\.json"):
        exported(tmp_path, tmp_path / "out")
    assert [] == list(tmp_path.iterdir())


# The same bytes


@pytest.mark.parametrize("form", COMPRESSIONS)
def test_the_same_command_makes_the_same_bytes(run: Path, tmp_path: Path, form: str) -> None:
    """Twice in this process, and in one with a different hash seed."""
    options: dict[str, Any] = {"splits": ["task", "train=0.5,test=0.5"], "shard_rows": 3}
    exported(run, tmp_path / "a", format=form, **options)
    exported(run, tmp_path / "b", format=form, **options)
    command = [sys.executable, "-m", "streamsyn", "export", str(run), "--to", str(tmp_path / "c")]
    command += ["--format", form, "--shard-rows", "3", "--split", "task", "--split", "train=0.5,test=0.5"]
    environment = {**os.environ, "PYTHONHASHSEED": str(len(form))}
    subprocess.run(command, env=environment, check=True, capture_output=True)

    first = tree(tmp_path / "a")
    assert [first] * 2 == [tree(tmp_path / name) for name in ("b", "c")]
    assert len(first) > 10


def test_more_processes_make_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of contexts and passages of a corpus, up to a limit; no process is left."""
    (tmp_path / "corpus.txt").write_text("A passage of the corpus that is long enough. " * 40)
    more: dict[str, Any] = {
        "corpus": [str(tmp_path / "corpus.txt")],
        "corpus_words": 20,
        "max_similarity": 0.8,
    }
    distractors = {"same_task": 3, "corpus": 1}
    contexts = [scored(n, context=f"Of {n}: " + " ".join(f"w{n * m}" for m in range(30))) for n in range(300)]
    root, _ = make_run(tmp_path / "run", contexts, distractors=distractors, window_bytes=60_000, **more)
    monkeypatch.setattr(log_reader, "SMALL_BYTES", 0)
    for workers in (1, 2):
        options: dict[str, Any] = {"format": "parquet", "splits": ["task"], "shard_rows": 30, "limit": 290}
        exported(root, tmp_path / f"by {workers}", workers=workers, **options)

    assert tree(tmp_path / "by 1") == tree(tmp_path / "by 2")
    assert 290 == len(rows_of(tmp_path / "by 2"))
    assert [] == multiprocessing.active_children()


@given(
    shard_rows=st.none() | st.integers(1, 50),
    shard_bytes=st.integers(1, 60_000),
    group_bytes=st.integers(1, 20_000),
    buffer_bytes=st.integers(1, 20_000),
    form=st.sampled_from(sorted(COMPRESSIONS)),
    splits=st.sampled_from([[], ["task"], ["a=0.3,b=0.7"], ["task", "a=0.3,b=0.7"]]),
)
@examples(20)
def test_no_row_is_lost_or_doubled(
    run: Path,
    shard_rows: int | None,
    shard_bytes: int,
    group_bytes: int,
    buffer_bytes: int,
    form: str,
    splits: list[str],
) -> None:
    """Wherever shards and row groups end, each row is written once and no shard exceeds its rows."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patched:
        patched.setattr(formats, "GROUP_BYTES", group_bytes)
        patched.setattr(formats, "BUFFER_BYTES", buffer_bytes)
        out = Path(name) / "out"
        given = {"format": form, "splits": splits, "shard_rows": shard_rows, "shard_bytes": shard_bytes}
        summary = exported(run, out, **given)
        found = sorted(rows_of(out), key=lambda row: int(row["id"].removeprefix("seed-")))

    by_id = sorted(samples_in(run), key=lambda row: int(row["id"].removeprefix("seed-")))
    assert by_id == as_samples(found)
    assert summary.files >= 40 / (shard_rows or 40)


def test_buffered_rows_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many splits there are, together they buffer no more than the limit."""
    monkeypatch.setattr(formats, "BUFFER_BYTES", 20_000)
    request = ExportRequest(root=tmp_path, to=str(tmp_path), format="parquet")
    writer = ShardWriter(Target(str(tmp_path), overwrite=False), request, lambda split: split.name)
    row = {
        "id": "a",
        "messages": [{"role": "user", "content": "x" * 1000}],
        "context_seqs": [],
        "flags": [],
    }
    held = 0
    for number in range(300):
        writer.write(Split(None, f"split-{number % 50}"), row)
        held = max(held, sum(one.writer.buffered_bytes for one in writer.splits.values() if one.writer))
    writer.close()

    assert 15_000 < held <= 20_000
    assert 300 == len(rows_of(tmp_path))


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    """The fields of contexts that get no sample are dropped when they leave the window."""
    contexts = [scored(n, checks={"flags": ["bad"]}, context="Short.") for n in range(1000)]
    contexts[-1] = scored(999, context="Short.")
    root, _ = make_run(tmp_path, contexts, exclude_flags=["bad"], window_bytes=20_000)
    reader = LogReader(ExportRequest(root=root, to="", flush=True), ExportSummary(""), tmp_path)

    for _ in reader.rows():
        assert len(reader._fields) < 200
