"""A run with partitions whose processes are killed: read as one, nothing is lost or doubled."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import streamsyn
from streamsyn.pipeline.status import status
from tests.system.conftest import Server, assert_clean, rows, start, wait_for_line
from tests.system.conftest import streamsyn as command

pytestmark = pytest.mark.crash

SEEDS = 40


@pytest.mark.timeout(120)
def test_a_coordinator_is_killed_and_then_all(
    serve: Callable[..., Server], seeds: Callable[..., Path], tmp_path: Path
) -> None:
    """A coordinator is started again; without the process that starts them, they stop; a resume ends it."""
    server, out = serve("--latency-ms", "60"), tmp_path / "out"
    arguments = ["run", "--seeds", seeds(SEEDS), "--server", server.url, "--out", out, "--partitions", "2"]
    arguments += ["--set", "fleet.max_in_flight=4", "--set", "sink.shard_bytes=20000"]
    arguments += ["--set", "assembly.contexts_per_sample=2"]
    process = start(*arguments)
    pid = re.search(r"pid=(\d+)", re.sub(r"\x1b\[[0-9;]*m", "", wait_for_line(process, "partition=1")))
    assert pid is not None
    while not rows(out / "partition-001", "contexts"):
        assert process.poll() is None
    os.kill(int(pid.group(1)), signal.SIGKILL)
    wait_for_line(process, "coordinator.restarts")
    process.kill()
    process.communicate()
    done = command(*arguments)

    assert 0 == done.returncode, done.stderr
    found = list(streamsyn.follow(out, kind="contexts"))
    assert SEEDS == len(found) == len({row["seed_id"] for row in found})
    assert list(range(SEEDS)) == [row["seq"] for row in found]
    assert {0, 1} == {row["partition"] for row in found}
    assert_clean(out)
    found_status = status(out)
    assert ("finished", SEEDS) == (found_status.state, found_status.contexts)
    assert server.stats()["requests"] - SEEDS <= 8
