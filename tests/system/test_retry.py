"""`streamsyn retry` as a user has it, and killed while it works."""

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from streamsyn.pipeline.verify import verify
from streamsyn.sink.retries import holding_rejects
from streamsyn.sink.snapshot import Snapshot
from tests.system.conftest import STARTED, Server, rows, streamsyn
from tests.system.test_kill_points import KILLER

SEEDS, IN_FLIGHT = 16, 4


def test_the_command_line_of_a_retry(
    serve: Callable[..., Server], seeds: Callable[..., Path], tmp_path: Path
) -> None:
    """A typo is answered with the reason meant; the summary of a run quotes one reject with its key."""
    out = tmp_path / "out"
    server = serve()
    run = ["run", "--seeds", seeds(3), "--server", server.url, "--out", out, "--no-progress"]
    first = streamsyn(*run, "--set", "checks.min_words=90000", "--set", "checks.max_words=100000")
    typo = streamsyn("retry", out, "--reason", "tooshort")
    none = streamsyn("retry", out, "--reason", "timeout")
    asked = server.stats()["requests"]
    again = streamsyn("retry", out, "--no-progress", "--set", "checks.min_words=5")

    assert "too_short, such as" in first.stderr
    assert "(checks.min_words)" in first.stderr
    assert f"streamsyn retry {out}" in first.stderr
    assert 2 == typo.returncode
    assert "'tooshort' is not a reason of rejection; did you mean too_short?" in typo.stderr
    assert (0, f"{out} has no rejects of reason timeout: nothing to retry\n") == (
        none.returncode,
        none.stderr,
    )
    assert (0, asked + 3) == (again.returncode, server.stats()["requests"]), again.stderr
    assert "retrying 3 rejects: too_short 3" in again.stderr
    assert "3 contexts, 0 rejects" in again.stderr


@pytest.mark.crash
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("point", "last"), [("fsync", 14), ("open", 10), ("rename", 6)])
def test_a_retry_killed_at_named_points(
    serve: Callable[..., Server], seeds: Callable[..., Path], tmp_path: Path, point: str, last: int
) -> None:
    """Whatever the point, each seed has one outcome that holds, and a plain run goes on with the retry."""
    server, out = serve("--latency-ms", "5"), tmp_path / "out"
    run = ["run", "--seeds", seeds(SEEDS), "--server", server.url, "--out", out, "--no-progress"]
    strict: dict[str, float] = {
        "checks.min_words": 90000,
        "checks.max_words": 100000,
        "assembly.contexts_per_sample": 2,
    }
    strict |= {"fleet.max_in_flight": IN_FLIGHT, "sink.sync_interval_s": 0.02, "sink.shard_bytes": 10000}
    for key, value in strict.items():
        run += ["--set", f"{key}={value}"]
    first = streamsyn(*run)
    assert 0 == first.returncode, first.stderr
    rejects, asked = rows(out, "rejects"), server.stats()["requests"]

    rng, killed = random.Random(point), 0
    for _ in range(3):
        retry = ["retry", str(out), "--no-progress", "--set", "checks.min_words=5"]
        command = [sys.executable, "-c", KILLER, str(out), point, str(rng.randint(1, last)), *retry]
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        STARTED.append(process)
        _, stderr = process.communicate(timeout=100)
        assert process.returncode in (0, -signal.SIGKILL), stderr.decode()
        killed += process.returncode != 0
        contexts = rows(out, "contexts")
        holding = {row["seq"] for row in holding_rejects(Snapshot(out))}
        assert {row["seq"] for row in rejects} - {row["supersedes"] for row in contexts} == holding
    resumed = streamsyn("run", "--out", out, "--no-progress")
    done = streamsyn("retry", out, "--no-progress")

    assert (0, 0) == (resumed.returncode, done.returncode), resumed.stderr + done.stderr
    assert killed > 0
    problems, found = verify(out)
    assert [] == problems
    assert {"contexts": SEEDS, "rejects": len(rejects), "samples": SEEDS} == found.counts
    assert [] == list(holding_rejects(Snapshot(out)))
    assert 5 == orjson.loads((out / "run.json").read_bytes())["fingerprint"]["checks.min_words"]
    assert server.stats()["requests"] - asked <= SEEDS + 2 * IN_FLIGHT * killed
