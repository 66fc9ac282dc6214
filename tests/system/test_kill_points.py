"""SIGKILL just before the n-th change of a kind to the run directory: no seed is lost, none is doubled.

STREAMSYN_KILLS says how many kills a case gets, STREAMSYN_KILLS_SEED which of the n are drawn.
"""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from streamsyn.pipeline.verify import verify
from tests.examples import one_in
from tests.system.conftest import STARTED, Server, streamsyn

pytestmark = [pytest.mark.crash, pytest.mark.timeout(900)]

KILLS = int(os.environ.get("STREAMSYN_KILLS", "1"))
SEED = int(os.environ.get("STREAMSYN_KILLS_SEED", "0"))
IN_FLIGHT = 4
SEEDS = 24
LAST = {"open": 10, "fsync": 16, "rename": 6, "remove": 2}
"""The last change of each kind before which a kill comes: about as many as one run makes."""
KILLER = """
import os, signal, sys

folder, point, left = sys.argv[1], sys.argv[2], int(sys.argv[3])

def reached(kind, path):
    global left
    if kind == point and os.fspath(path).startswith(folder):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def audit(event, given):
    if event in ("os.rename", "os.remove"):
        reached(event[3:], given[0])
    elif event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR) and not isinstance(given[0], int):
        reached("open", given[0])

def killing(call):
    def synced(fd):
        reached("fsync", os.readlink(f"/proc/self/fd/{fd}"))
        return call(fd)
    return synced

sys.addaudithook(audit)
os.fsync, os.fdatasync = killing(os.fsync), killing(os.fdatasync)
sys.argv = ["streamsyn", *sys.argv[4:]]
from streamsyn.cli.main import main

main()
"""


@pytest.mark.parametrize(
    ("point", "source", "compression"),
    one_in(
        2,
        [
            ("open", "pipe", "none"),
            ("open", "file", "zstd"),
            ("fsync", "file", "zstd"),
            ("fsync", "pipe", "none"),
            ("rename", "pipe", "none"),
            ("rename", "file", "zstd"),
            ("remove", "file", "zstd"),
            ("remove", "pipe", "none"),
        ],
    ),
)
def test_kills_at_named_points(
    serve: Callable[..., Server],
    seeds: Callable[..., Path],
    tmp_path: Path,
    point: str,
    source: str,
    compression: str,
) -> None:
    """Whatever the point, one outcome a seed, and few requests are sent twice."""
    # One answer in 10 ms, so that the 5 ms in which the sink gathers a batch hold one at most.
    server, path, out = serve("--latency-ms", "10", "--slots", "1"), seeds(SEEDS), tmp_path / "out"
    run = ["run", "--no-preflight", "--seeds", "-" if source == "pipe" else path]
    run += ["--server", server.url, "--out", out]
    run += ["--no-progress", "--set", f"sink.compression={compression}", "--set", "sink.shard_bytes=10000"]
    run += ["--set", f"fleet.max_in_flight={IN_FLIGHT}", "--set", "sink.sync_interval_s=0.02"]
    run += ["--set", "assembly.contexts_per_sample=2", "--set", "checks.min_words=5"]
    rng, killed = random.Random(f"{SEED} {compression} {source} {point}"), 0
    for _ in range(KILLS):
        number = rng.randint(1, LAST[point])
        command = [sys.executable, "-c", KILLER, str(out), point, str(number), *map(str, run)]
        with path.open("rb") as lines:
            process = subprocess.Popen(command, stdin=lines, stderr=subprocess.PIPE)
            STARTED.append(process)
            _, stderr = process.communicate(timeout=100)
        assert process.returncode in (0, -signal.SIGKILL), (number, stderr.decode())
        killed += process.returncode != 0
    with path.open("rb") as lines:
        done = streamsyn(*run, stdin=lines)
    problems, found = verify(out)

    assert 0 == done.returncode, done.stderr
    assert killed > 0
    assert [] == problems
    assert {"contexts": SEEDS, "rejects": 0, "samples": SEEDS} == found.counts
    # What was in flight, and what was answered while the sink gathered the batch that it writes next.
    assert server.stats()["requests"] - SEEDS <= (IN_FLIGHT + 1) * killed
