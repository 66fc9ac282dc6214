"""Retention: only what the mirror has and all named consumers have read; nobody takes it for damage."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.daemon.disk_space import Retention, RetentionTask, remove_old
from streamsyn.errors import ConfigError, RowsRemoved
from streamsyn.following.run_rows import RunRows
from streamsyn.pipeline.status import status
from streamsyn.pipeline.verify import verify
from streamsyn.report.run_metrics import RunMetrics
from streamsyn.sink.manifest import Manifest, SealedShard, removed_rows
from tests.daemon.conftest import StartDaemon
from tests.examples import examples
from tests.sink.test_mirror import running

ALL = Retention(bytes=0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with a mirror at FAR beside it, and several shards of samples."""
    with running(tmp_path / "run", str(tmp_path / "far")) as going_on:
        going_on.write(60)
        going_on.finish()
    assert len(shards_of(tmp_path / "run")) > 3
    return tmp_path / "run"


def shards_of(root: Path) -> list[SealedShard]:
    return Manifest(root / "manifest.jsonl").of_kind("samples")


def remove(root: Path, retention: Retention = ALL, acked: int | None = None) -> list[str]:
    return [shard.path for shard in remove_old(root, str(root.parent / "far"), retention, acked)]


def shard(number: int, size: int, sealed_at: float) -> SealedShard:
    given: dict[str, Any] = {"kind": "samples", "path": f"{number}", "rows": 1, "sha256": "", "tokens": {}}
    given |= {"first_seq": number, "last_seq": number, "model": ""}
    return SealedShard(**given, bytes=size, sealed_at=sealed_at)


@given(
    sizes=st.lists(st.integers(1, 50)),
    seconds=st.none() | st.integers(0, 30),
    limit=st.none() | st.integers(0, 300),
)
@examples(100)
def test_the_limits_keep_the_latest_shards(sizes: list[int], seconds: int | None, limit: int | None) -> None:
    """Neither more nor less than what exceeds the age or the size."""
    shards = [shard(number, size, float(number)) for number, size in enumerate(sizes)]
    now = float(len(sizes))
    old = list(Retention(seconds=seconds, bytes=limit).exceeding(shards, now))
    assert old == shards[: len(old)]
    left = shards[len(old) :]
    assert seconds is None or all(now - one.sealed_at <= seconds for one in left)
    assert limit is None or sum(one.bytes for one in left) <= limit
    if old and limit is not None and sum(one.bytes for one in shards[len(old) - 1 :]) <= limit:
        assert seconds is not None
        assert now - old[-1].sealed_at > seconds


def test_what_was_removed_is_not_taken_for_damage(run: Path) -> None:
    before, samples = status(run), len(RunRows(run).lines(0, 1000))
    kept = shards_of(run)[2]
    assert remove(run, acked=kept.first_seq) == [one.path for one in shards_of(run)[:2]]
    assert not (run / shards_of(run)[0].path).exists()
    problems, found = verify(run)
    assert (problems, len(found.notes)) == ([], 2)
    assert "removed by retention" in found.notes[0]
    assert status(run) == before
    metrics = RunMetrics(run)
    assert (metrics.is_complete, metrics.samples_removed) == (True, kept.first_seq)
    assert metrics.counts["samples"] == samples - kept.first_seq
    assert len(metrics.notes) == 1
    assert len(RunRows(run).lines(kept.first_seq, 1000)) == samples - kept.first_seq
    with pytest.raises(RowsRemoved, match="were removed by retention") as raised:
        RunRows(run).lines(kept.first_seq - 1, 1)
    assert raised.value.first_seq == kept.first_seq


def test_a_run_is_taken_up_after_samples_were_removed(run: Path) -> None:
    samples = status(run).samples
    assert remove(run)
    with running(run, str(run.parent / "far")) as going_on:
        assert list(going_on.log.read_sample_lines()) == []
        going_on.write(20)
        going_on.finish()
    assert status(run).samples > samples
    assert verify(run)[0] == []
    assert verify(run.parent / "far")[0] == []  # the mirror has all of them
    assert len(RunRows(run.parent / "far").lines(0, 1000)) == status(run).samples


def test_the_slowest_consumer_is_never_passed(run: Path) -> None:
    first = shards_of(run)[0]
    assert remove(run, acked=first.last_seq - 1) == []
    assert remove(run, acked=first.last_seq) == [first.path]


def test_what_the_mirror_lacks_is_kept(run: Path) -> None:
    first, second, *_ = shards_of(run)
    far = run.parent / "far"
    (far / second.path).rename(run.parent / "aside")
    assert remove(run) == [first.path]
    (run.parent / "aside").rename(far / second.path)
    (run / "index" / "mirror.json").unlink()  # nothing tells what was verified
    assert remove(run) == []


def test_a_kill_between_the_record_and_the_files_is_made_good(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_args, **_kwargs: killed(run))
        with pytest.raises(KeyboardInterrupt):
            remove(run)
    assert (run / shards_of(run)[0].path).exists()
    assert removed_rows(run) == status(run).samples
    assert verify(run)[0] == []
    assert remove(run) == [one.path for one in shards_of(run)]
    assert list((run / "samples").glob("part-*")) == []


def test_a_new_mirror_that_lacks_them_is_refused(run: Path) -> None:
    assert remove(run)
    with (
        pytest.raises(ConfigError, match="which retention has removed"),
        running(run, str(run.parent / "new")),
    ):
        pass
    shutil.copytree(run.parent / "far", run.parent / "new", dirs_exist_ok=True)
    with running(run, str(run.parent / "new")):
        pass


def test_age_counts_from_when_a_shard_was_sealed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr("streamsyn.daemon.disk_space.time.time", lambda: now + 50)
    assert remove(run, Retention(seconds=100)) == []
    monkeypatch.setattr("streamsyn.daemon.disk_space.time.time", lambda: now + 150)
    assert remove(run, Retention(seconds=100)) == [one.path for one in shards_of(run)]
    assert removed_rows(run) == status(run).samples


async def test_the_daemon_removes_what_no_consumer_needs(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """A reader that asks for removed rows is told which is the first one left."""
    keys = {"sink.mirror": str(tmp_path / "far"), "sink.shard_bytes": 2000, "serve.retain_bytes": 1}
    async with start_daemon(keys) as served:
        for run_id in ("a", "b"):  # each has a folder of its own in the mirror
            await served.new_run(run_id)
            await served.submit(run_id, 6)
            await served.ask("PUT", f"/v1/runs/{run_id}/consumers/trainer")
            await served.ask("POST", f"/v1/runs/{run_id}/close")
            assert (await served.until_state(run_id, "finished"))["last"]["samples"] == 5
        task = RetentionTask(served.daemon.runs, lambda: served.daemon.config.serve)
        await task.look()
        path = "/v1/runs/a/samples"
        async with served.session.get(path) as answer:
            assert len((await answer.read()).splitlines()) == 6
        await served.ask("POST", "/v1/runs/a/consumers/trainer/ack", {"seq": 3})
        await task.look()
        problem = await served.refused("GET", path)
        first = problem["first_seq"]
        assert (problem["status"], 0 < first <= 4) == (410, True)
        async with served.session.get(f"{path}?after={first - 1}") as answer:
            assert len((await answer.read()).splitlines()) == 6 - first
        async with served.session.get("/v1/runs/b/samples") as answer:
            assert len((await answer.read()).splitlines()) == 6
        assert (await served.ask("GET", "/v1/runs/a"))["counts"]["samples"] == 6


async def test_trouble_with_one_run_does_not_keep_others_from_being_looked_at(
    start_daemon: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []

    def failing(root: Path, *_: Any) -> list[SealedShard]:
        looked.append(root.name)
        raise OSError("the mirror is away")

    monkeypatch.setattr("streamsyn.daemon.disk_space.remove_old", failing)
    async with start_daemon({"sink.mirror": str(tmp_path / "far"), "serve.retain_s": 1}) as served:
        for run_id in ("a", "b"):
            await served.new_run(run_id)
        await RetentionTask(served.daemon.runs, lambda: served.daemon.config.serve).look()
    assert looked[-2:] == ["a", "b"]
