"""A shard and a log when something fails: nothing is damaged, and everything can be closed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from streamsyn.errors import SinkError
from streamsyn.sink import shards
from streamsyn.sink.epoch import Epoch
from streamsyn.sink.log import RunLog
from streamsyn.sink.manifest import Manifest
from streamsyn.sink.shards import OpenShard
from tests.builders import COMPRESSIONS, as_rows, context, new_run, opened, rows, sink


def failing(*_: Any) -> Any:
    raise OSError(5, "Input/output error")


def descriptors() -> int:
    """How many this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def open_shard(tmp_path: Path) -> OpenShard:
    folder = tmp_path / "contexts"
    folder.mkdir()
    return OpenShard(folder / "part-000000.jsonl", "contexts", 0, Epoch(tmp_path))


@pytest.mark.parametrize("again", [OpenShard.close, OpenShard.sync])
def test_a_closed_shard_leaves_other_files_alone(
    open_shard: OpenShard, tmp_path: Path, again: Callable[[OpenShard], None]
) -> None:
    """Its descriptor may belong to a different file by then."""
    open_shard.close()
    with (tmp_path / "other").open("wb") as other:
        again(open_shard)
        other.write(b"still open")

    assert b"still open" == (tmp_path / "other").read_bytes()


def test_a_shard_that_cannot_be_synced_is_closed(
    open_shard: OpenShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No descriptor is left open, and closing it again is not an error."""
    before = descriptors()
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output"):
        open_shard.close()
    open_shard.close()

    assert before - 1 == descriptors()


@pytest.mark.parametrize("step", ["rename", "sync_folder"])
def test_a_log_can_be_closed_after_sealing_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Wherever it failed, closing raises nothing, and the next run has every row."""
    log = RunLog(new_run(tmp_path), sink())
    log.append([context(0)])
    with monkeypatch.context() as patch:
        patch.setattr(Path if step == "rename" else shards, step, failing)
        with pytest.raises(SinkError, match="cannot seal a shard of contexts"):
            log.contexts.seal()
    log.close()
    log.close()

    with opened(tmp_path, sink()) as again:
        again.append([context(1)])
    assert as_rows([context(0), context(1)]) == rows(tmp_path, "contexts")


@pytest.mark.parametrize("model", [["a", "list"], {"a": 1}, 7, "ü\x00"])
def test_a_server_may_call_itself_anything(tmp_path: Path, model: Any) -> None:
    """No value of `model` can keep a shard from being sealed."""
    with opened(tmp_path, sink()) as log:
        log.append([context(0, model=model)])
        log.contexts.seal()

    assert [str(model)] == [shards.model for shards in Manifest(tmp_path / "manifest.jsonl").shards]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_what_was_not_written_whole_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    """An append that fails half way leaves no half row, and is not counted."""
    write = os.write
    calls = []

    def half(fd: int, data: memoryview) -> int:
        calls.append(fd)
        return write(fd, data[: len(data) // 2]) if len(calls) == 1 else int(failing())

    with opened(tmp_path, sink(compression=compression)) as log:
        log.append([context(0)])
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half)
            with pytest.raises(SinkError, match="cannot write contexts"):
                log.append([context(1), context(2)])
        assert log.contexts.rows == 1
        log.append([context(3)])
        log.contexts.seal()

    assert as_rows([context(0), context(3)]) == rows(tmp_path, "contexts")
    (sealed,) = Manifest(tmp_path / "manifest.jsonl").shards
    assert (tmp_path / sealed.path).stat().st_size == sealed.bytes


def test_a_record_that_cannot_be_encoded_does_not_count(tmp_path: Path) -> None:
    """The log stays as it was, and can be appended to."""
    with opened(tmp_path, sink()) as log:
        with pytest.raises(TypeError):
            log.append([context(0), context(1, metadata={"number": 2**70})])
        log.append([context(2)])

    assert as_rows([context(2)]) == rows(tmp_path, "contexts")


@pytest.mark.parametrize("quietly", [False, True])
def test_closing_quietly_hides_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quietly: bool
) -> None:
    """Everything is closed; a failure is raised, or logged when a different error is being raised."""
    log = RunLog(new_run(tmp_path), sink())
    log.append([context(0)])
    before = descriptors()
    monkeypatch.setattr(os, "fsync", failing)
    with capture_logs() as logged:
        if quietly:
            log.close(quietly=True)
        else:
            with pytest.raises(SinkError, match="cannot sync contexts"):
                log.close()

    assert (["log.close_failed"] if quietly else []) == [line["event"] for line in logged]
    assert descriptors() < before
    assert [0] == [row["seq"] for row in shards.rows(next(tmp_path.glob("contexts/*.open")))]
