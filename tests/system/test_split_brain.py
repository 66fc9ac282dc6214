"""Split brain: a run that was paused goes on after a different process has taken its directory."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.conftest import Server, assert_clean, rows, start, streamsyn, wait_for_line

pytestmark = pytest.mark.crash


def test_a_run_that_wakes_up_stops_itself(
    serve: Callable[..., Server], seeds: Callable[..., Path], tmp_path: Path
) -> None:
    """It is stopped in the middle, another one finishes, and it ends with 75: each seed has one outcome."""
    server, out = serve("--latency-ms", "200"), tmp_path / "out"
    arguments = ["run", "--seeds", seeds(60), "--server", server.url, "--out", out, "--no-progress"]
    arguments += ["--set", "fleet.max_in_flight=8", "--set", "sink.shard_bytes=20000"]
    arguments += ["--set", "fleet.hedge_tail=false"]  # a hedge is a further request
    first = start(*arguments)
    wait_for_line(first, "run.started")
    while server.stats()["requests"] < 20:
        assert first.poll() is None
    first.send_signal(signal.SIGSTOP)

    refused = streamsyn(*arguments)
    assert 2 == refused.returncode
    assert f"is in use by another process (pid {first.pid} on " in refused.stderr
    second = streamsyn(*arguments, "--take-over")
    assert 0 == second.returncode, second.stderr
    finished = (out / "manifest.jsonl").read_bytes()
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=30)

    assert 75 == first.returncode
    assert b"was taken over by pid" in errors.splitlines()[-1]
    assert 1 == errors.count(b"taken over"), errors.decode()
    assert finished == (out / "manifest.jsonl").read_bytes()
    assert 60 == len({row["seed_id"] for row in rows(out, "contexts")}) == len(rows(out, "contexts"))
    assert_clean(out)
    # What was in flight is asked again, and the first run begins some more before it looks.
    assert server.stats()["requests"] <= 60 + 4 * 8
