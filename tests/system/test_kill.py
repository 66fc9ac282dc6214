"""SIGKILL at random moments: no seed is lost, none is doubled, hardly anything is asked twice."""

import os
import random
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.system.conftest import Server, assert_clean, rows, start, streamsyn, wait_for_line

pytestmark = pytest.mark.crash

KILLS = int(os.environ.get("STREAMSYN_KILLS", "5"))
SEEDS = 60 * KILLS
IN_FLIGHT = 8


@pytest.mark.timeout(900)
def test_kill_at_random_moments(
    serve: Callable[..., Server], seeds: Callable[..., Path], tmp_path: Path
) -> None:
    """After the kills and a resume each seed has one outcome; repeated requests stay within what was
    in flight at the kills."""
    server, out, path = serve("--latency-ms", "80", "--jitter-ms", "30"), tmp_path / "out", seeds(SEEDS)
    arguments = ["run", "--seeds", path, "--server", server.url, "--out", out, "--no-progress"]
    arguments += ["--set", f"fleet.max_in_flight={IN_FLIGHT}", "--set", "sink.shard_bytes=100000"]
    arguments += ["--set", "fleet.hedge_tail=false"]
    arguments += ["--set", "sink.sync_interval_s=0.05", "--set", "assembly.contexts_per_sample=3"]
    moments = random.Random(int(os.environ.get("STREAMSYN_KILLS_SEED", "7")))
    for kill in range(KILLS):
        process = start(*arguments)
        wait_for_line(process, "run.started")
        with suppress(subprocess.TimeoutExpired):  # it still runs, as it should
            process.wait(moments.uniform(0, 0.4))
        while kill == KILLS - 1 and not rows(out, "contexts"):
            assert process.poll() is None
        process.kill()
        process.communicate()
    in_between = len(rows(out, "contexts"))
    done = streamsyn(*arguments, "--set", "fleet.max_in_flight=128")

    assert done.returncode == 0, done.stderr
    assert 0 < in_between < SEEDS
    contexts = rows(out, "contexts")
    assert SEEDS == len(contexts) == len({row["seed_id"] for row in contexts})
    assert [] == rows(out, "rejects")
    assert list(range(SEEDS)) == [row["seq"] for row in contexts]
    assert sorted(row["seed_id"] for row in contexts) == sorted(
        row["seed_id"] for row in rows(out, "samples")
    )
    # In flight at each kill, and answers that had come and were being written while the machine was busy.
    assert server.stats()["requests"] - SEEDS <= 2 * IN_FLIGHT * KILLS
    assert_clean(out)


@pytest.mark.timeout(120)
def test_samples_do_not_depend_on_kills(
    serve: Callable[..., Server], seeds: Callable[..., Path], tmp_path: Path
) -> None:
    """Assembling the log of a run that was killed gives, line by line, what the run itself wrote."""
    server, out, path = serve("--latency-ms", "20"), tmp_path / "out", seeds(400)
    arguments = ["run", "--seeds", path, "--server", server.url, "--out", out, "--no-progress"]
    arguments += ["--set", "fleet.max_in_flight=8", "--set", "assembly.window_bytes=60000"]
    for kind in ("contexts", "samples"):
        process = start(*arguments)
        wait_for_line(process, "run.started")
        while not rows(out, kind):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()

    assert 0 == streamsyn(*arguments).returncode
    assert 400 == len(rows(out, "samples"))
    assert_clean(out)  # it assembles the log again and compares
