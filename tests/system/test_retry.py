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
from streamsyn.sink.snapshot import Snapshot, holding_rejects
from tests.examples import one_in
from tests.system.conftest import STARTED, Server, rows, streamsyn
from tests.system.test_kill_points import KILLER

SEEDS, IN_FLIGHT = 16, 4


def test_the_command_line_of_a_retry(
    serve: Callable[..., Server], seeds: Callable[..., Path], tmp_path: Path
) -> None:
    """A typo is answered with the reason meant; the summary of a run quotes one reject with its key."""
    out = tmp_path / "out"
    server = serve()
    path = seeds(3)
    with path.open("a") as file:
        file.write("no json\n")
    run = ["run", "--seeds", path, "--server", server.url, "--out", out, "--no-progress"]
    run += ["--set", "run.max_reject_fraction=1"]
    first = streamsyn(*run, "--set", "checks.min_words=90000", "--set", "checks.max_words=100000")
    typo = streamsyn("retry", out, "--reason", "tooshort")
    none = streamsyn("retry", out, "--reason", "timeout")
    asked = server.stats()["requests"]
    again = streamsyn("retry", out, "--no-progress", "--set", "checks.min_words=5")
    left = streamsyn("retry", out, "--log-json")

    assert "too_short, such as" in first.stderr
    assert "fewer than checks.min_words = 90000" in first.stderr
    assert f"streamsyn retry {out}" in first.stderr
    assert 2 == typo.returncode
    assert "'tooshort' is not a reason of rejection; did you mean too_short?" in typo.stderr
    nothing = f"{out} has no rejects of these reasons (timeout): nothing to retry\n"
    assert (0, nothing) == (none.returncode, none.stderr)
    assert (0, asked + 3) == (again.returncode, server.stats()["requests"]), again.stderr
    assert "retrying 4 rejects: too_short 3, invalid_json 1" in again.stderr
    assert "3 contexts, 1 rejects" in again.stderr
    assert "  not asked  1 rejects: their lines still cannot be read" in again.stderr
    events = [orjson.loads(line) for line in left.stderr.splitlines()]
    assert {"invalid_json": 1} == next(one["rejects"] for one in events if one["event"] == "retry.left")


@pytest.mark.crash
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("point", "last"), one_in(3, [("rename", 6), ("fsync", 14), ("open", 10)]))
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
        "run.max_reject_fraction": 1.0,
    }
    strict |= {
        "run.max_reject_fraction": 1,
        "fleet.max_in_flight": IN_FLIGHT,
        "sink.sync_interval_s": 0.02,
        "sink.shard_bytes": 10000,
    }
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
