"""The log on disk: what is appended is there again, whole and once, whatever happens in between."""

import os
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.config.sections import SinkSection
from streamsyn.errors import SinkError
from streamsyn.records import Context, Outcome, Sample
from streamsyn.sink import shards
from streamsyn.sink.completed_keys import Claim
from streamsyn.sink.log import RunLog, ShardLog
from streamsyn.sink.manifest import Manifest
from streamsyn.sink.shards import KINDS
from streamsyn.sink.snapshot import Snapshot
from tests.builders import (
    COMPRESSIONS,
    as_rows,
    context,
    disk_full_beyond,
    new_run,
    opened,
    outcome,
    rows,
    sample,
    sealed_bytes,
    sink,
)
from tests.examples import examples

STEPS = st.sampled_from(["outcomes", "samples", "sync", "reopen", "seal", "finish"])


def of_kinds(outcomes: list[Outcome]) -> tuple[list[Outcome], list[Outcome]]:
    contexts = [one for one in outcomes if isinstance(one, Context)]
    return [*contexts], [one for one in outcomes if not isinstance(one, Context)]


def claims_of(log: RunLog, outcomes: list[Outcome]) -> Counter[Claim]:
    claims = log.claims()
    try:
        return Counter(claims.claim(one.key) for one in outcomes)
    finally:
        claims.close()


def manifest_as_it_should_be(root: Path) -> list[dict[str, Any]]:
    """What the manifest must say of the shards, found by reading them."""
    found = []
    for kind in KINDS:
        for path in sorted((root / kind).glob("part-*")):
            if path.suffix == ".open":
                continue
            inside = list(shards.rows(path))
            tokens = {
                name: sum(row.get(f"{name}_tokens", 0) for row in inside)
                for name in ("prompt", "cached", "completion")
            }
            relative = str(path.relative_to(root))
            found.append(
                {
                    "kind": kind,
                    "path": relative,
                    "rows": len(inside),
                    "bytes": path.stat().st_size,
                    "sha256": sealed_bytes(root)[relative],
                    "first_seq": inside[0]["seq"],
                    "last_seq": inside[-1]["seq"],
                    "tokens": tokens,
                    "model": "model" if kind == "contexts" else "",
                }
            )
    return found


@examples(40)
@given(
    steps=st.lists(st.tuples(STEPS, st.integers(1, 9)), max_size=25),
    compression=st.sampled_from(COMPRESSIONS),
    shard_bytes=st.sampled_from([1, 700, 3000]),
)
def test_what_is_appended_is_there_again(
    steps: list[tuple[str, int]], compression: str, shard_bytes: int
) -> None:
    """Batches and shards of any size, reopened at any time: dense seqs, equal rows, a true manifest."""
    section = sink(compression=compression, shard_bytes=shard_bytes)
    outcomes: list[Outcome] = []
    samples: list[Sample] = []
    sealed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = new_run(Path(folder))
        log = RunLog(root, section)
        for step, number in steps:
            match step:
                case "outcomes":
                    new = [outcome(len(outcomes) + n) for n in range(number)]
                    outcomes += new
                    log.append(new)
                case "samples":
                    made = [sample(len(samples) + n) for n in range(number)]
                    samples += made
                    log.samples.append(made)
                case "sync":
                    log.sync()
                case "seal":
                    log.seal_outcomes()
                case "finish":
                    log.seal_outcomes()
                    log.finish()
                case "reopen":
                    log.close()
                    log = RunLog(root, section)
                    finished = Counter({Claim.FINISHED: len(outcomes)}) if outcomes else Counter()
                    assert finished == claims_of(log, outcomes)
            sealed |= {path: sha for path, sha in sealed_bytes(root).items() if path not in sealed}
        log.close()
        contexts, rejects = of_kinds(outcomes)

        assert as_rows(contexts) == rows(root, "contexts")
        assert as_rows(rejects) == rows(root, "rejects")
        assert as_rows(samples) == rows(root, "samples")
        assert sealed == sealed_bytes(root)
        lines = [orjson.loads(line) for line in (root / "manifest.jsonl").read_bytes().splitlines()]
        listed = [line for line in lines if "kind" in line]
        assert all(line.pop("sealed_at") > 0 for line in listed)
        assert manifest_as_it_should_be(root) == sorted(
            listed, key=lambda line: (KINDS.index(line["kind"]), line["first_seq"])
        )


# What a kill or a loss of power may leave of the open shard


def three_appends(root: Path, compression: str) -> tuple[Path, list[int]]:
    """An open shard of 2 + 1 + 2 contexts, and its size after each append."""
    log = contexts_of(root, compression)
    path = root / "contexts" / f"part-000000{shards.SUFFIXES[compression]}.open"
    sizes = []
    for first, count in ((0, 2), (2, 1), (3, 2)):
        log.append([context(number) for number in range(first, first + count)])
        sizes.append(path.stat().st_size)
    log.close()
    return path, sizes


def contexts_of(root: Path, compression: str) -> ShardLog:
    section = sink(compression=compression, shard_bytes=10**6)
    return ShardLog(new_run(root), "contexts", Manifest(root / "manifest.jsonl"), section)


def recovered(root: Path, compression: str) -> list[int]:
    """Take the log up again; the seqs that it kept."""
    log = contexts_of(root, compression)
    kept = [row["seq"] for row in log.recover()]
    log.close()
    return kept


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_shard_cut_at_any_byte_keeps_every_whole_row(
    tmp_path: Path, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows (zstd: appends) that are whole survive a cut at every offset; the torn rest goes."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of them take a minute on a busy disk
    path, sizes = three_appends(tmp_path, compression)
    whole = path.read_bytes()
    if compression == "none":
        ends = [0]
        for line in whole.splitlines(keepends=True):
            ends.append(ends[-1] + len(line))
        kept_at = {end: n for n, end in enumerate(ends)}
    else:
        kept_at = {0: 0, sizes[0]: 2, sizes[1]: 3, sizes[2]: 5}
    wrong = []
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        good, expected = max((end, n) for end, n in kept_at.items() if end <= size)
        kept = recovered(tmp_path, compression)
        if (list(range(expected)), whole[:good]) != (kept, path.read_bytes()):
            wrong.append((size, expected, kept))

    assert [] == wrong


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("size", [0, 1, 500, 900])
def test_what_was_torn_is_written_again(tmp_path: Path, compression: str, size: int) -> None:
    """A resumed log goes on where the cut was, as if nothing had been torn."""
    path, _ = three_appends(tmp_path, compression)
    path.write_bytes(path.read_bytes()[:size])
    log = contexts_of(tmp_path, compression)
    log.recover()
    log.append([context(number) for number in range(log.rows, 7)])
    log.seal()

    assert as_rows(context(number) for number in range(7)) == rows(tmp_path, "contexts")
    assert (
        manifest_as_it_should_be(tmp_path)[0]["sha256"]
        == Manifest(tmp_path / "manifest.jsonl").shards[0].sha256
    )


RANDOM = random.Random(7).randbytes(300)
TAILS = {
    "NULs": b"\0" * 5000,
    "NULs and a newline": b"\0" * 5000 + b"\n",
    "an empty line": b"\n",
    "garbage": RANDOM,
    "garbage in lines": RANDOM + b"\n" + RANDOM + b"\n",
    "a line that is no object": b"[]\n1\n",
    "a row of another place": b'{"seq":7}\n',
    "a row without seq": b"{}\n",
    "half a row": b'{"seq":5,"seed_id":"x","draft":0',
    "rows behind a torn one": b'{"seq":5,"se\0\0\0\0\n{"seq":6}\n',
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_a_tail_that_was_never_synced_is_cut(tmp_path: Path, compression: str, tail: bytes) -> None:
    """Whatever a loss of power leaves after the last synced row is cut; the rows stay."""
    path, sizes = three_appends(tmp_path, compression)
    with path.open("ab") as file:
        file.write(tail)

    assert [0, 1, 2, 3, 4] == recovered(tmp_path, compression)
    assert sizes[-1] == path.stat().st_size


def zstd_frame(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(data)


FRAME_TAILS = {
    "the start of a frame": zstd_frame(b'{"seq":5}\n')[:6],
    "a frame with a wrong checksum": zstd_frame(b'{"seq":5,"seed_id":"x","draft":0}\n')[:-1] + b"!",
    "a frame of another place": zstd_frame(b'{"seq":9}\n'),
    "a frame of half a row": zstd_frame(b'{"seq":5,"see'),
    "a plain row": b'{"seq":5,"seed_id":"x","draft":0}\n',
    "a long frame, torn": zstd_frame(random.Random(8).randbytes(3 << 20))[:-2],
}


@pytest.mark.parametrize("tail", FRAME_TAILS.values(), ids=FRAME_TAILS)
def test_a_frame_that_does_not_check_is_cut(tmp_path: Path, tail: bytes) -> None:
    """A torn or foreign zstd frame is cut; the frames before it stay."""
    path, sizes = three_appends(tmp_path, "zstd")
    with path.open("ab") as file:
        file.write(tail)

    assert [0, 1, 2, 3, 4] == recovered(tmp_path, "zstd")
    assert sizes[-1] == path.stat().st_size


def test_a_changed_byte_in_a_frame_is_found(tmp_path: Path) -> None:
    """Whichever byte of a zstd append changes, no changed row is accepted."""
    path, sizes = three_appends(tmp_path, "zstd")
    whole, as_written = path.read_bytes(), list(shards.rows(path))
    for at in range(sizes[1], sizes[2]):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        read = list(shards.rows(path))
        # (one bit of a frame's header means nothing, so not every change must be noticed)
        assert read in (as_written[:3], as_written)


# A kill while a shard is sealed: close, rename, line of the manifest, index


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_kill_within_sealing_loses_and_doubles_nothing(tmp_path: Path, compression: str) -> None:
    """Killed before the rename, in the manifest's line, or before the index: each row is there once."""
    section = sink(compression=compression, shard_bytes=10**6)
    done = [outcome(number) for number in range(11)]
    more = [outcome(number) for number in range(11, 19)]
    before = tmp_path / "before"
    with opened(before, section) as log:
        log.append(done[:4])
        log.contexts.seal()
        log.append(done[4:])
    after = tmp_path / "after"
    shutil.copytree(before, after)
    with opened(after, section) as log:
        log.contexts.seal()
    manifest = (after / "manifest.jsonl").read_bytes()
    line_starts = len((before / "manifest.jsonl").read_bytes())
    index = ["finished.sqlite", "finished.sqlite-wal", "finished.sqlite-shm"]

    def crashed(number: int, manifest_bytes: int, *, indexed: bool) -> Path:
        root = tmp_path / f"crashed-{number}"
        shutil.copytree(after, root)
        (root / "manifest.jsonl").write_bytes(manifest[:manifest_bytes])
        if not indexed:
            for name in index:
                (root / "index" / name).unlink(missing_ok=True)
                if (before / "index" / name).exists():
                    shutil.copy(before / "index" / name, root / "index" / name)
        return root

    cuts = sorted({*range(line_starts, len(manifest), 29), len(manifest) - 1, len(manifest)})
    roots = [before, *(crashed(at, at, indexed=False) for at in cuts)]
    roots += [crashed(10**6 + at, at, indexed=True) for at in (line_starts, len(manifest))]
    for root in roots:
        with opened(root, section) as log:
            assert Counter({Claim.FINISHED: 11}) == claims_of(log, done), root
            log.append(more)
            log.seal_outcomes()
        with opened(root, section) as log:
            assert Counter({Claim.FINISHED: 19}) == claims_of(log, done + more), root
        contexts, rejects = of_kinds(done + more)
        assert as_rows(contexts) == rows(root, "contexts"), root
        assert as_rows(rejects) == rows(root, "rejects"), root


ROWS = {"none": 2, "zstd": 1}
"""Contexts in a full shard."""


def small_shards(compression: str) -> SinkSection:
    """Shards that ROWS contexts fill."""
    return sink(compression=compression, shard_bytes={"none": 500, "zstd": 1}[compression])


def unsealed_shards(root: Path, compression: str) -> Path:
    """Nine contexts, in shards of which none was sealed before the kill."""
    log = RunLog(new_run(root), small_shards(compression))
    log.append([context(number) for number in range(9)])
    log.close()
    assert -(-9 // ROWS[compression]) == len(list((root / "contexts").glob("*.open")))
    return root


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("sealed", [0, 1])
def test_a_kill_before_full_shards_are_sealed_loses_nothing(
    tmp_path: Path, compression: str, sealed: int
) -> None:
    """Answers are written while a sync runs, so full shards may wait for theirs; the next run seals them."""
    root = unsealed_shards(tmp_path, compression)
    for path in sorted((root / "contexts").glob("*.open"))[:sealed]:  # renamed, and not listed
        path.rename(path.with_suffix(""))
    with opened(root, small_shards(compression)) as log:
        assert list(range(8 // ROWS[compression])) == [int(s.path[14:20]) for s in log.manifest.shards]
        log.append([context(9)])
        log.sync()
        assert Counter({Claim.FINISHED: 10}) == claims_of(log, [context(number) for number in range(10)])

    assert as_rows(context(number) for number in range(10)) == rows(root, "contexts")
    assert (
        manifest_as_it_should_be(root)[:4]
        == [
            {name: value for name, value in orjson.loads(line).items() if name != "sealed_at"}
            for line in (root / "manifest.jsonl").read_bytes().splitlines()
        ][:4]
    )


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("damaged", range(5))
def test_rows_behind_a_torn_shard_are_written_again(tmp_path: Path, compression: str, damaged: int) -> None:
    """A loss of power took the end of an unsynced shard, or all of it: those behind it do not count."""
    for number, kept in enumerate([None, 0, 100, 200]):
        root = unsealed_shards(tmp_path / str(number), compression)
        path = sorted((root / "contexts").glob("*.open"))[damaged]
        if kept is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:kept])
        listed = [row["seq"] for part in Snapshot(root).parts["contexts"] for row in part.rows()]
        assert list(range(ROWS[compression] * damaged)) == listed
        with opened(root, small_shards(compression)) as log:
            assert len(listed) == log.contexts.rows == len(rows(root, "contexts"))
            log.append([context(number) for number in range(log.contexts.rows, 12)])
            log.sync()

        assert as_rows(context(number) for number in range(12)) == rows(root, "contexts")


def test_a_shard_sealed_again_is_indexed_again(tmp_path: Path) -> None:
    """A shard whose line the manifest lost, sealed again with more rows, is read again for the index."""
    section = sink(shard_bytes=10**6)
    with opened(tmp_path, section) as log:
        log.append([context(0)])
        log.contexts.seal()
    (tmp_path / "manifest.jsonl").write_bytes(b"")
    shutil.copytree(tmp_path / "index", tmp_path / "old-index")
    with opened(tmp_path, section) as log:
        log.append([context(1)])
        log.contexts.seal()
    manifest = (tmp_path / "manifest.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "index")
    shutil.copytree(tmp_path / "old-index", tmp_path / "index")
    (tmp_path / "manifest.jsonl").write_bytes(b"")
    (tmp_path / "contexts" / "part-000000.jsonl").rename(tmp_path / "contexts" / "kept")
    opened_once = RunLog(tmp_path, section)  # forgets the shard that is not listed
    opened_once.close()
    (tmp_path / "contexts" / "kept").rename(tmp_path / "contexts" / "part-000000.jsonl")
    (tmp_path / "manifest.jsonl").write_bytes(manifest)

    with opened(tmp_path, section) as log:
        assert Counter({Claim.FINISHED: 2}) == claims_of(log, [context(0), context(1)])


def test_a_manifest_that_lost_lines_is_refused(tmp_path: Path) -> None:
    """More than one shard that the manifest does not list: nothing is overwritten, the shard is named."""
    with opened(tmp_path, sink(shard_bytes=1)) as log:
        log.append([context(0), context(1)])
        log.sync()
    (tmp_path / "manifest.jsonl").unlink()
    before = sealed_bytes(tmp_path)

    with pytest.raises(
        SinkError, match=r"part-000001\.jsonl is not in manifest\.jsonl, which lists 0 shards"
    ):
        RunLog(tmp_path, sink(shard_bytes=1))
    assert before == sealed_bytes(tmp_path)


# A full disk


def message_of(raised: pytest.ExceptionInfo[SinkError]) -> str:
    text = str(raised.value)
    assert 1 == len(text.splitlines())
    return text


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_full_disk_stops_with_one_clear_line_and_resumes(tmp_path: Path, compression: str) -> None:
    """A row that does not fit raises SinkError; with room again, what was written before it is there."""
    section = sink(compression=compression, shard_bytes=10**6)
    log = RunLog(new_run(tmp_path), section)
    written: list[int] = []

    def write_on() -> None:
        while True:
            log.append([context(len(written))])
            log.sync()
            written.append(log.contexts.rows)

    with disk_full_beyond(4000), pytest.raises(SinkError) as raised:
        write_on()
    log.close()
    with opened(tmp_path, section) as again:
        resumed_at = again.contexts.rows
        again.append([context(number) for number in range(resumed_at, 30)])

    assert (
        f"cannot write contexts to {tmp_path}: File too large; what is on disk stays valid: "
        "make room and run again to resume"
    ) == message_of(raised)
    assert len(written) > 3
    assert len(written) == resumed_at
    assert as_rows(context(number) for number in range(30)) == rows(tmp_path, "contexts")


def test_a_disk_too_full_for_the_index_stops_with_one_clear_line(tmp_path: Path) -> None:
    """The index is derived: without room for it the run stops, and a later run catches up."""
    section = sink(shard_bytes=10**6)
    log = RunLog(new_run(tmp_path), section)
    log.append([outcome(number) for number in range(20)])
    with disk_full_beyond(30_000), pytest.raises(SinkError) as raised:
        log.seal_outcomes()
    log.close()

    assert "index/finished.sqlite" in message_of(raised)
    assert "make room and run again" in message_of(raised)
    with opened(tmp_path, section) as again:
        again.seal_outcomes()
        assert Counter({Claim.FINISHED: 20}) == claims_of(again, [outcome(number) for number in range(20)])


def test_a_manifest_is_whole_again_after_the_disk_was_full(tmp_path: Path) -> None:
    """Wherever in a line the disk was full, the next line is not joined to half a line; nothing is lost."""
    section = sink(shard_bytes=1)
    full = tmp_path / "full"
    log = ShardLog(new_run(full), "contexts", Manifest(full / "manifest.jsonl"), section)
    log.append([context(0)])
    one_line = (full / "manifest.jsonl").stat().st_size
    log.append([context(1)])
    two_lines = (full / "manifest.jsonl").stat().st_size
    row = (full / "contexts" / "part-000000.jsonl").stat().st_size
    for limit in range(max(one_line, row + 10), two_lines, 23):
        root = new_run(tmp_path / str(limit))
        manifest = Manifest(root / "manifest.jsonl")
        log = ShardLog(root, "contexts", manifest, section)
        log.append([context(0)])
        with disk_full_beyond(limit), pytest.raises(SinkError):
            log.append([context(1)])
        manifest.add_flush(1)  # as another thread may, when there is room again

        again = Manifest(root / "manifest.jsonl")
        assert ([0], [1], 0) == ([shard.last_seq for shard in again.shards], again.flushes, again.torn_bytes)
        resumed = ShardLog(root, "contexts", again, section)
        resumed.recover()
        resumed.append([context(2)])
        assert as_rows(context(number) for number in range(3)) == rows(root, "contexts")


# Reading while another thread writes


def test_a_reader_follows_a_log_that_is_sealed_under_it(tmp_path: Path) -> None:
    """Rows are read once and in order, though their shard is renamed meanwhile."""
    with opened(tmp_path, sink(shard_bytes=10**6)) as log:
        log.append([context(number) for number in range(4)])
        log.contexts.seal()
        log.append([context(number) for number in range(4, 8)])
        reading = log.read_contexts(0, 8)
        read = [next(reading)["seq"] for _ in range(3)]
        log.contexts.seal()
        log.append([context(8)])
        log.contexts.seal()
        read += [row["seq"] for row in reading]

    assert list(range(8)) == read


def test_contexts_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    """A reader never gets fewer rows than it asked for without an error."""
    with opened(tmp_path, sink(shard_bytes=1)) as log:
        log.append([context(number) for number in range(3)])
        log.append([context(number) for number in range(3, 6)])
        log.sync()
        (tmp_path / "contexts" / "part-000001.jsonl").unlink()
        reading = log.read_contexts(1, 5)

        with pytest.raises(SinkError, match=r"row 1 of .*contexts cannot be read"):
            next(reading)
        assert [3, 4] == [row["seq"] for row in log.read_contexts(3, 5)]


def test_readers_see_outcomes_once_synced_and_samples_once_written(tmp_path: Path) -> None:
    """What a loss of power may take back and replace by a different row is not shown."""
    shown: list[tuple[str, int]] = []
    log = RunLog(new_run(tmp_path), sink(), lambda kind, rows: shown.append((kind, rows)))
    log.append([context(0), context(1), outcome(3)])
    log.samples.append([sample(0)])
    assert shown == [("samples", 0), ("contexts", 0), ("rejects", 0), ("samples", 1)]
    shown.clear()
    log.sync()
    log.append([context(number) for number in (4, 5, 6, 8, 9, 10)])  # fills a shard, and syncs none
    assert shown == [("contexts", 2), ("rejects", 1)]
    shown.clear()
    log.sync()
    assert shown == [("contexts", 8), ("rejects", 1)]
    log.close()
    shown.clear()
    RunLog(tmp_path, sink(), lambda kind, rows: shown.append((kind, rows))).close()
    assert shown == [("samples", 1), ("contexts", 8), ("rejects", 1)]
