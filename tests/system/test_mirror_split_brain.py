"""Runs on nodes with local disks, and one mirror: killed, resumed elsewhere, paused and woken again."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from streamsyn.pipeline.verify import verify
from streamsyn.sink.mirror_epoch import read_lists
from streamsyn.sink.mirror_target import MirrorTarget
from tests.system.conftest import Server, assert_clean, rows, start, streamsyn, wait_for_line

pytestmark = pytest.mark.crash

SEEDS = 40


def files(far: Path) -> dict[str, bytes]:
    """All of a mirror."""
    return {str(path.relative_to(far)): path.read_bytes() for path in far.rglob("*") if path.is_file()}


def listed_shards(far: Path) -> int:
    """The shards of contexts that the mirror lists."""
    return sum(b'"kind":"contexts"' in raw for raw in read_lists(MirrorTarget(str(far))).manifest)


def test_a_run_goes_on_from_its_mirror(
    serve: Callable[..., Server], seeds: Callable[..., Path], tmp_path: Path
) -> None:
    """The first is killed; the second is stopped in the middle; the third ends, and wakes the second."""
    server, far = serve("--latency-ms", "100"), tmp_path / "far"
    arguments = ["run", "--seeds", seeds(SEEDS), "--server", server.url, "--no-progress"]
    arguments += ["--set", "fleet.max_in_flight=6", "--set", "sink.shard_bytes=10000"]
    arguments += ["--set", "fleet.hedge_tail=false", "--set", f"sink.mirror={far.as_uri()}"]
    first = start(*arguments, "--out", tmp_path / "a")
    while listed_shards(far) < 1:
        assert first.poll() is None
    first.kill()
    first.communicate()
    kept = [path.read_bytes() for path in sorted((far / "contexts").iterdir())[: listed_shards(far)]]

    second = start(*arguments, "--out", tmp_path / "b")
    assert "restored" in wait_for_line(second, "mirror.restored")
    shards = listed_shards(far)
    while listed_shards(far) == shards:
        assert second.poll() is None
    second.send_signal(signal.SIGSTOP)
    refused = streamsyn(*arguments, "--out", tmp_path / "c")
    assert 2 == refused.returncode
    assert f"is in use by pid {second.pid} on " in refused.stderr
    third = streamsyn(*arguments, "--out", tmp_path / "c", "--take-over")
    assert 0 == third.returncode, third.stderr
    assert 1 == third.stderr.count("mirror.restored")
    before = files(far)
    second.send_signal(signal.SIGCONT)
    _, errors = second.communicate(timeout=30)

    assert 75 == second.returncode, errors.decode()
    assert b"was taken over by pid" in errors.splitlines()[-1]
    assert before == files(far)
    found = rows(tmp_path / "c", "contexts")
    assert list(range(SEEDS)) == [row["seq"] for row in found]
    assert SEEDS == len({row["seed_id"] for row in found})
    resumed = sorted((tmp_path / "c" / "contexts").iterdir())
    assert kept == [path.read_bytes() for path in resumed[: len(kept)]]
    assert_clean(tmp_path / "c")
    assert [] == verify(far)[0]
