"""`verify`: nothing is wrong with a run directory that is as it should be; each damage is found and named."""

import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from streamsyn.assembly.resources import AssemblyResources
from streamsyn.config.fingerprint import fingerprint
from streamsyn.config.loading import Config
from streamsyn.errors import ConfigError, DirectoryInUse, SinkError
from streamsyn.pipeline.delivery import AssemblyStage
from streamsyn.pipeline.verify import Verification, repair, verify
from streamsyn.records import Outcome, Sample
from streamsyn.sink import shards
from streamsyn.sink.log import RunLog
from streamsyn.sink.manifest import Manifest
from streamsyn.sink.rundir import RunDirectory
from tests.assembly.tokenizers_made import SUPPORTED, made, save
from tests.builders import COMPRESSIONS, context, outcome, rows

NOT_FINISHED = "manifest.jsonl: no final line after all rows: the run is not finished"


class Outlet:
    """Records samples."""

    def __init__(self, log: RunLog) -> None:
        self._log = log

    def deliver(self, samples: Sequence[Sample]) -> None:
        self._log.samples.append(samples)

    def stop(self) -> None:
        pass


def config_of(compression: str = "none", **assembly: Any) -> Config:
    return Config.model_validate(
        {
            "sink": {"compression": compression, "shard_bytes": {"none": 4700, "zstd": 940}[compression]},
            "assembly": {"contexts_per_sample": 3, **assembly},
        }
    )


def run(root: Path, config: Config, outcomes: Sequence[Outcome], *, to_the_end: bool) -> None:
    """Log outcomes behind those that are there, and make samples, as a run does."""
    directory = RunDirectory(root)
    materials = AssemblyResources(config.assembly)
    directory.save(config.model_dump(mode="json"), fingerprint(config) | materials.fingerprint())
    log = RunLog(root, config.sink)
    for number in range(0, len(outcomes), 3):
        log.append(outcomes[number : number + 3])
        log.sync()
    stage = AssemblyStage(
        lambda: materials.assembler(config.run.seed),
        log,
        Outlet(log),
        logged=log.contexts.rows,
        delivered=log.samples.rows,
        flushes=log.manifest.flushes,
    )
    if config.assembly.write:
        stage.catch_up()
    if to_the_end:
        log.seal_outcomes()
        if config.assembly.write:
            stage.finish()
        log.finish()
    log.close()
    directory.close()


@pytest.fixture(params=COMPRESSIONS)
def compression(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def finished(tmp_path: Path, compression: str) -> Path:
    """A run that came to its end: several shards of each kind."""
    run(tmp_path, config_of(compression), [outcome(n) for n in range(40)], to_the_end=True)
    assert {"contexts": 30, "rejects": 10, "samples": 30} == verify(tmp_path)[1].counts
    return tmp_path


@pytest.fixture
def interrupted(tmp_path: Path, compression: str) -> Path:
    """A run that was killed: sealed shards and open ones of each kind."""
    run(tmp_path, config_of(compression), [outcome(n) for n in range(40)], to_the_end=False)
    assert 3 == len(list(tmp_path.glob("*/part-*.open")))
    return tmp_path


def problems(root: Path) -> list[str]:
    return verify(root)[0]


def notes(root: Path) -> list[str]:
    found, verification = verify(root)
    assert [] == found
    return verification.notes


def shard(root: Path, kind: str, number: int = 0) -> Path:
    return next((root / kind).glob(f"part-{number:06d}.*"))


def open_shard(root: Path, kind: str) -> Path:
    return next((root / kind).glob("part-*.open"))


def rewrite(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change the rows of an open shard."""
    inside = list(shards.rows(path))
    change(inside)
    lines = b"".join(map(shards.line, inside))
    path.write_bytes(shards.encode(lines, "zstd" if ".zst" in path.suffixes else "none"))


# Nothing is wrong


def test_a_finished_run_is_sound(finished: Path) -> None:
    """No problem and no note."""
    assert [] == notes(finished)


def test_an_interrupted_run_is_sound(interrupted: Path) -> None:
    """That it is not finished is a note, not a problem."""
    assert [NOT_FINISHED] == notes(interrupted)


def test_a_run_without_samples_is_sound(tmp_path: Path) -> None:
    """With `assembly.write = false` no samples are expected."""
    run(tmp_path, config_of(write=False), [outcome(n) for n in range(9)], to_the_end=True)

    assert [] == notes(tmp_path)


def test_a_resumed_run_is_sound(finished: Path, compression: str) -> None:
    """With more seeds after the end, while they are written and at their end."""
    more = [outcome(n) for n in range(40, 47)]
    run(finished, config_of(compression), more, to_the_end=False)
    on_the_way = notes(finished)
    run(finished, config_of(compression), [outcome(n) for n in range(47, 60)], to_the_end=True)

    assert [NOT_FINISHED] == on_the_way
    assert [] == notes(finished)


def test_killed_before_the_last_samples(finished: Path, compression: str) -> None:
    """Outcomes whose samples are still to be made are not a problem."""
    log = RunLog(finished, config_of(compression).sink)
    log.append([context(n) for n in range(100, 110)])
    log.close()

    assert [NOT_FINISHED] == notes(finished)


# Damage


def test_a_flipped_byte_in_a_sealed_shard_is_found(finished: Path) -> None:
    """Any byte, in any kind of shard: the shard is named."""
    for kind in ("contexts", "rejects", "samples"):
        path = shard(finished, kind)
        data = path.read_bytes()
        for at in range(0, len(data), len(data) // 17):
            path.write_bytes(data[:at] + bytes([data[at] ^ 0x04]) + data[at + 1 :])
            changed = "has changed since it was sealed (sha256); restore it from a copy"
            assert f"{path.relative_to(finished)}: {changed}" in problems(finished), at
        path.write_bytes(data)

    assert [] == problems(finished)


@pytest.mark.parametrize("kind", ["contexts", "rejects", "samples"])
def test_a_missing_shard_is_found(finished: Path, kind: str) -> None:
    """It is named, also when it is the last one."""
    for path in (shard(finished, kind), max((finished / kind).iterdir())):
        kept = path.read_bytes()
        path.unlink()
        assert f"{path.relative_to(finished)}: is missing; restore it from a copy" in problems(finished)
        path.write_bytes(kept)


def test_a_shard_that_was_cut_is_found(finished: Path) -> None:
    """A sealed shard is not as long as the manifest says."""
    path = shard(finished, "contexts", 1)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])

    assert (
        f"{path.relative_to(finished)}: {size - 10} bytes, the manifest says {size}; restore it from a copy"
    ) in problems(finished)


def test_a_wrong_number_of_rows_is_found(finished: Path) -> None:
    """The manifest says how many rows a shard has."""
    manifest = finished / "manifest.jsonl"
    lines = [orjson.loads(line) for line in manifest.read_bytes().splitlines()]
    changed = next(line for line in lines if line.get("kind") == "contexts")
    changed["rows"] += 1
    manifest.write_bytes(b"".join(map(shards.line, lines)))

    assert f"{changed['path']}: {changed['rows'] - 1} rows, the manifest says {changed['rows']}" in problems(
        finished
    )


@pytest.mark.parametrize("kind", ["contexts", "rejects"])
def test_a_second_outcome_of_a_draft_is_found(interrupted: Path, kind: str) -> None:
    """G1: none twice. The draft is named, and the shard with its second outcome."""
    first = rows(interrupted, kind)[0]
    path = open_shard(interrupted, kind)
    rewrite(path, lambda inside: inside.append({**first, "seq": inside[-1]["seq"] + 1}))
    seq = rows(interrupted, kind)[-1]["seq"]

    name = first["id"] or first["origin"]
    assert [f"{path.relative_to(interrupted)}: row {seq}: {name} has more than one outcome"] == problems(
        interrupted
    )


@pytest.mark.parametrize("kind", ["contexts", "rejects", "samples"])
def test_a_missing_seq_is_found(interrupted: Path, kind: str) -> None:
    """G3: dense and rising. The place is named, once."""
    path = open_shard(interrupted, kind)
    first = next(shards.rows(path))["seq"]

    def shift(inside: list[dict[str, Any]]) -> None:
        for row in inside:
            row["seq"] += 1

    rewrite(path, shift)

    assert [f"{path.relative_to(interrupted)}: seq is {first + 1}, expected {first}"] == [
        line for line in problems(interrupted) if "seq" in line
    ]


def test_a_row_of_no_seed_is_found(interrupted: Path) -> None:
    """A row that does not name its seed."""
    path = open_shard(interrupted, "contexts")
    rewrite(path, lambda inside: inside[0].pop("seed_id"))
    seq = next(shards.rows(path))["seq"]

    assert [f"{path.relative_to(interrupted)}: row {seq} does not name its seed"] == problems(interrupted)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"messages": []}, "differs from what the log assembles to"),
        ({"relevant_index": 2, "n_tokens": 0}, "differs from what the log assembles to"),
        ({"context_seqs": [999]}, "names contexts that are not in the log"),
        ({"context_seqs": None}, "names contexts that are not in the log"),
    ],
)
def test_a_changed_sample_is_found(interrupted: Path, change: dict[str, Any], what: str) -> None:
    """G3: samples are what the log assembles to, also those in a shard that is not sealed."""
    path = open_shard(interrupted, "samples")
    rewrite(path, lambda inside: inside[0].update(change))
    seq = next(shards.rows(path))["seq"]

    assert f"{path.relative_to(interrupted)}: sample {seq} {what}" in problems(interrupted)


def test_samples_that_are_missing_at_the_end_are_found(tmp_path: Path) -> None:
    """A finished run has a sample for each context."""
    config = config_of()
    run(tmp_path, config, [outcome(n) for n in range(9)], to_the_end=False)
    log = RunLog(tmp_path, config.sink)
    log.seal_outcomes()
    log.append([context(n) for n in range(100, 103)])
    log.contexts.seal()
    log.finish()
    log.close()

    assert ["samples: fewer than the log assembles to"] == problems(tmp_path)


def test_wrong_final_counts_are_found(finished: Path) -> None:
    """The final line says how many rows of each kind there are."""
    manifest = Manifest(finished / "manifest.jsonl")
    manifest.add_final({**(manifest.final or {}), "contexts": 31, "samples": 0})

    assert ["manifest.jsonl: its final line does not match the rows of contexts, samples"] == problems(
        finished
    )


def test_a_broken_manifest_is_named(finished: Path) -> None:
    """With file and line."""
    manifest = finished / "manifest.jsonl"
    manifest.write_bytes(b"{}\n" + manifest.read_bytes())

    with pytest.raises(ConfigError, match=r"manifest\.jsonl:1: invalid manifest line"):
        verify(finished)


def test_a_folder_without_run_json_is_refused(tmp_path: Path) -> None:
    """And nothing is created in it."""
    for call in (verify, repair):
        with pytest.raises(ConfigError, match=r"is not a run directory: it has no run\.json"):
            call(tmp_path)

    assert [] == list(tmp_path.iterdir())


# What a kill leaves, and repair


def leave_torn_tails(root: Path) -> None:
    for path in [*root.glob("*/part-*.open"), root / "manifest.jsonl"]:
        with path.open("ab") as file:
            file.write(b'{"torn')


def forget_last_shard(root: Path) -> None:
    """As a kill between a shard's name and the manifest's line does."""
    manifest = root / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    last = orjson.loads(lines[-1])
    for path in (root / last["kind"]).glob("part-*.open"):
        path.unlink()
    manifest.write_bytes(b"".join(lines[:-1]))


def spoil_index(root: Path) -> None:
    for path in (root / "index").iterdir():
        path.write_bytes(b"garbage" * 1000)


def lose_derived(root: Path) -> None:
    shutil.rmtree(root / "index")
    (root / "assembly.json").write_bytes(b"{")


def test_torn_tails_are_notes(interrupted: Path) -> None:
    """A kill leaves them: each is noted with its file and its size."""
    names = [str(path.relative_to(interrupted)) for path in sorted(interrupted.glob("*/part-*.open"))]
    leave_torn_tails(interrupted)

    assert {
        *(f"{name}: 6 bytes of an unfinished last row" for name in names),
        "manifest.jsonl: 6 bytes of an unfinished last line",
        NOT_FINISHED,
    } == set(notes(interrupted))


def test_a_shard_that_is_not_listed_is_a_note(tmp_path: Path) -> None:
    """Killed while it was sealed: it is read, and noted."""
    run(tmp_path, config_of(write=False), [context(n) for n in range(20)], to_the_end=False)
    path = tmp_path / orjson.loads((tmp_path / "manifest.jsonl").read_bytes().splitlines()[-1])["path"]
    forget_last_shard(tmp_path)

    assert f"{path.relative_to(tmp_path)}: sealed, but not listed in manifest.jsonl" in notes(tmp_path)


@pytest.mark.parametrize("damage", [leave_torn_tails, spoil_index, lose_derived])
def test_repair_after_a_kill(interrupted: Path, damage: Callable[[Path], None]) -> None:
    """Afterwards only the unfinished run is noted, no row is lost, and the run can go on to its end."""
    before = {kind: rows(interrupted, kind) for kind in ("contexts", "rejects", "samples")}
    saved = orjson.loads((interrupted / "run.json").read_bytes())["config"]
    damage(interrupted)
    repair(interrupted)

    assert [NOT_FINISHED] == notes(interrupted)
    assert before == {kind: rows(interrupted, kind) for kind in before}
    run(interrupted, Config.model_validate(saved), [outcome(n) for n in range(40, 45)], to_the_end=True)
    assert [] == notes(interrupted)


def test_repair_lists_a_shard_that_was_just_sealed(tmp_path: Path) -> None:
    """It becomes the open shard again."""
    run(tmp_path, config_of(write=False), [context(n) for n in range(20)], to_the_end=False)
    forget_last_shard(tmp_path)
    left = rows(tmp_path, "contexts")
    repair(tmp_path)

    assert [NOT_FINISHED] == notes(tmp_path)
    assert left == rows(tmp_path, "contexts")


def test_repair_leaves_a_damaged_shard_alone(finished: Path) -> None:
    """A shard that cannot be made again is named, and nothing is changed."""
    path = shard(finished, "contexts")
    path.unlink()

    with pytest.raises(
        SinkError, match=r"contexts/part-000000\.jsonl.* cannot be read: .*restore it from a copy"
    ):
        repair(finished)
    assert f"{path.relative_to(finished)}: is missing; restore it from a copy" in problems(finished)


def test_repair_is_refused_while_a_run_writes(interrupted: Path) -> None:
    """The lock is held."""
    directory = RunDirectory(interrupted)
    with pytest.raises(DirectoryInUse):
        repair(interrupted)
    directory.close()


@pytest.mark.parametrize("damage", ["missing", "cut", "changed", "open"])
def test_repair_has_damaged_samples_made_again(finished: Path, compression: str, damage: str) -> None:
    """The next run makes the same samples, byte for byte."""
    before = {kind: rows(finished, kind) for kind in ("contexts", "rejects", "samples")}
    config = config_of(compression)
    path = shard(finished, "samples", 1)
    data = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(data[:-10])
        case "changed":
            path.write_bytes(data.replace(b"a", b"b"))
        case "open":
            run(finished, config, [outcome(n) for n in range(40, 44)], to_the_end=False)
            before = {kind: rows(finished, kind) for kind in before}
            rewrite(open_shard(finished, "samples"), lambda inside: inside[0].update(messages=[]))
    repair(finished)

    assert [NOT_FINISHED] == notes(finished)
    run(finished, config, [], to_the_end=damage != "open")
    assert [NOT_FINISHED] * (damage == "open") == notes(finished)
    assert before == {kind: rows(finished, kind) for kind in before}


def test_repair_keeps_samples_that_cannot_be_made_again(finished: Path) -> None:
    """With contexts damaged as well, samples stay as they are."""
    shard(finished, "samples", 1).unlink()
    shard(finished, "contexts").unlink()
    left = sorted(finished.glob("samples/*"))
    with pytest.raises(SinkError, match="restore it from a copy"):
        repair(finished)

    assert left == sorted(finished.glob("samples/*"))


# What else is in the directory


@pytest.mark.parametrize("kind", ["contexts", "rejects", "samples"])
def test_a_directory_in_place_of_a_shard_is_found(interrupted: Path, kind: str) -> None:
    """Sealed or open: it is named."""
    for path in {shard(interrupted, kind), open_shard(interrupted, kind)}:
        path.unlink()
        path.mkdir()
        assert f"{path.relative_to(interrupted)}: is a directory; a shard belongs here" in problems(
            interrupted
        )


@pytest.mark.parametrize("name", ["stdin.jsonl", "seeds.jsonl"])
def test_a_spool_that_was_cut_is_a_note(finished: Path, name: str) -> None:
    """A kill leaves half a line at its end; a damaged line before others is a problem."""
    spool = finished / "spool" / name
    spool.parent.mkdir()
    spool.write_bytes(b'{"seed":{}}\n{"bad":{}}\n{"se')
    torn = notes(finished)
    spool.write_bytes(b'{"seed":{}}\n{"ba\n{"seed":{}}\n')

    assert [f"spool/{name}: 4 bytes of an unfinished last line"] == torn
    assert [f"spool/{name}:2 is damaged: seeds after it would not be read again"] == problems(finished)


def test_a_key_of_a_newer_version_is_named(finished: Path) -> None:
    """One line, with the file and the key."""
    saved = orjson.loads((finished / "run.json").read_bytes())
    saved["config"]["assembly"]["news"] = 1
    (finished / "run.json").write_bytes(orjson.dumps(saved))

    for call in (verify, repair):
        with pytest.raises(ConfigError, match=r"run\.json: unknown key assembly\.news"):
            call(finished)


def test_a_template_is_used_as_it_was(tmp_path: Path) -> None:
    """As run.json has it, when the file has changed or is gone; if run.json lacks it, that is a problem."""
    template, root = tmp_path / "own.j2", tmp_path / "out"
    template.write_bytes(b"{{ instruction }}\r\n{{ contexts | join }}")
    run(root, config_of(template=str(template)), [outcome(n) for n in range(9)], to_the_end=True)
    template.write_text("other")
    changed = notes(root)
    template.unlink()
    gone = notes(root)
    saved = orjson.loads((root / "run.json").read_bytes())
    del saved["fingerprint"]["assembly.template"]
    (root / "run.json").write_bytes(orjson.dumps(saved))

    assert ([], []) == (changed, gone)
    (problem,) = problems(root)
    assert problem.startswith(
        f"samples cannot be compared with the log: cannot read the template {template}: "
    )


def test_templates_of_a_different_version_are_noted(finished: Path) -> None:
    """Samples are not reported as wrong when the packaged templates have changed."""
    saved = orjson.loads((finished / "run.json").read_bytes())
    saved["fingerprint"]["assembly.prompts"] = "other"
    (finished / "run.json").write_bytes(orjson.dumps(saved))

    assert ["samples are not compared with the log: changed since: packaged templates"] == notes(finished)


# While a run is writing


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_run_that_is_writing_is_sound(tmp_path: Path, compression: str) -> None:
    """At any moment while shards grow and are sealed."""
    config = config_of(compression)
    run(tmp_path, config, [outcome(0)], to_the_end=False)

    def write() -> None:
        for number in range(1, 60, 5):
            more = [outcome(n) for n in range(number, number + 5)]
            run(tmp_path, config, more, to_the_end=number % 15 == 1)

    writing = threading.Thread(target=write)
    writing.start()
    looks = []
    while writing.is_alive():
        looks.append(problems(tmp_path))
    writing.join()

    assert len(looks) > 3
    assert [] == [found for found in looks if found]


def test_a_shard_sealed_after_the_snapshot_is_read(interrupted: Path, compression: str) -> None:
    """Under its new name, up to its size at the snapshot."""
    verification = Verification(interrupted)
    counts = {kind: len(rows(interrupted, kind)) for kind in ("contexts", "rejects", "samples")}
    run(interrupted, config_of(compression), [outcome(n) for n in range(40, 60)], to_the_end=True)

    assert [] == list(verification.problems(None))
    assert counts == verification.counts


# Tokenizer and corpus


@pytest.fixture
def measured(tmp_path: Path) -> tuple[Path, Path]:
    """A run whose samples are counted by a tokenizer and hold passages of a corpus; and its materials."""
    materials, root = tmp_path / "materials", tmp_path / "out"
    save(materials / "tokenizer", made(SUPPORTED["llama3"], ["some words"]))
    (materials / "corpus.txt").write_text(" ".join(f"word{n}" for n in range(200)))
    config = config_of(
        tokenizer=str(materials / "tokenizer"),
        distractors={"same_task": 1, "corpus": 1},
        corpus=[str(materials / "corpus.txt")],
        corpus_words=20,
        target_tokens=300,
        max_tokens=900,
    )
    run(root, config, [outcome(n) for n in range(20)], to_the_end=True)
    return root, materials


def test_samples_are_compared_by_their_tokenizer_and_corpus(measured: tuple[Path, Path]) -> None:
    """Samples match what the log and these files give."""
    root, _ = measured
    samples = rows(root, "samples")

    assert [] == notes(root)
    assert 15 == len(samples)
    assert any(None in sample["context_seqs"] for sample in samples)
    assert all(300 <= sample["n_tokens"] <= 900 and sample["target_tokens"] == 300 for sample in samples)


@pytest.mark.parametrize(
    ("file", "what"), [("tokenizer/tokenizer_config.json", "the tokenizer"), ("corpus.txt", "the corpus")]
)
def test_resources_that_have_changed_are_noted(measured: tuple[Path, Path], file: str, what: str) -> None:
    """Samples are not reported as wrong when tokenizer or corpus have changed or are gone."""
    root, materials = measured
    path = materials / file
    path.write_text(
        path.read_text().replace("word1", "other").replace("assistant", "x").replace("trim", "upper")
    )
    changed = notes(root)
    shutil.rmtree(materials)
    gone = notes(root)

    assert [f"samples are not compared with the log: changed since: {what}"] == changed
    assert ["samples are not compared with the log: assembly."] == [note[:48] for note in gone]


def test_samples_of_an_older_version_are_not_compared(finished: Path) -> None:
    """They may lack fields that this version writes."""
    saved = orjson.loads((finished / "run.json").read_bytes())
    del saved["fingerprint"]["assembly.max_similarity"]
    (finished / "run.json").write_bytes(orjson.dumps(saved))

    (note,) = notes(finished)
    assert "newer version" in note


def test_where_only_the_directory_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its temporary files are made there, and deleted."""
    run(tmp_path, config_of(), [outcome(number) for number in range(8)], to_the_end=True)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    monkeypatch.setenv("TMPDIR", "/proc/none")
    assert verify(tmp_path)[0] == []
    assert before == sorted(tmp_path.rglob("*"))


def test_a_repair_keeps_the_owners_of_ids(finished: Path) -> None:
    """They are not derived from the log: a resumed run would give other ids."""
    ids, derived = finished / "index" / "ids.sqlite", finished / "index" / "read.sqlite"
    ids.write_bytes(b"owners")
    derived.write_bytes(b"keys")

    repair(finished)

    assert b"owners" == ids.read_bytes()
    assert not derived.exists()
