"""SIGKILL at random moments of a process that writes the log as fast as it can."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streamsyn.records import Context
from streamsyn.sink.completed_keys import Claim
from streamsyn.sink.manifest import Manifest
from streamsyn.sink.rundir import RunDirectory
from tests.builders import COMPRESSIONS, as_rows, opened, outcome, rows, sealed_bytes, sink

pytestmark = pytest.mark.crash

KILLS = int(os.environ.get("STREAMSYN_KILLS", "3"))

WRITER = """
import sys
from pathlib import Path
from streamsyn.sink.rundir import RunDirectory
from streamsyn.sink.log import RunLog
from tests.builders import outcome, sink

root, compression, number, *missing = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
directory = RunDirectory(root)
log = RunLog(root, sink(compression=compression, shard_bytes=4000))
log.append([outcome(n) for n in missing])
print(number, flush=True)
while True:
    batch = [outcome(number + n) for n in range(1 + number % 7)]
    log.append(batch)
    number += len(batch)
    if number % 3 == 0:
        log.sync()
    print(number, flush=True)
"""


def write_and_kill(root: Path, compression: str, number: int, missing: list[int], lines: int) -> int:
    """Write `missing`, then from `number` on; kill after `lines` of output; return the number reached."""
    command = [sys.executable, "-c", WRITER, str(root), compression, *map(str, [number, *missing])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(lines + 1):
            reached = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        for line in writer.stdout.read().splitlines(keepends=True):  # said before the kill came
            if line.endswith("\n"):
                reached = int(line)
    assert -signal.SIGKILL == writer.returncode
    return reached


def without_seq(rows_of_kind: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the order of where their seeds stood."""
    assert list(range(len(rows_of_kind))) == [row["seq"] for row in rows_of_kind]
    plain = [{name: value for name, value in row.items() if name != "seq"} for row in rows_of_kind]
    return sorted(plain, key=lambda row: int(row["origin"].partition(":")[2]))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_kill_loses_and_doubles_nothing(tmp_path: Path, compression: str) -> None:
    """What `append` returned from is there after SIGKILL; each outcome is there once; sealed shards stay."""
    rng, number, missing, sealed = random.Random(compression), 0, list[int](), dict[str, str]()
    for _ in range(KILLS):
        reached = write_and_kill(tmp_path, compression, number, missing, rng.randrange(40))
        RunDirectory(tmp_path).close()  # the lock went with the process
        with opened(tmp_path, sink(compression=compression, shard_bytes=4000)) as log:
            claims = log.claims()
            done = [n for n in range(reached + 20) if claims.claim(outcome(n).key) is Claim.FINISHED]
            claims.close()
            assert list(range(reached)) == done[:reached]
            assert len(done) == log.outcomes
        # of the batch that was being written, contexts may be there without the rejects before them
        number = done[-1] + 1 if done else 0
        missing = sorted(set(range(number)) - set(done))
        expected = [outcome(n) for n in done]
        contexts = [one for one in expected if isinstance(one, Context)]
        assert without_seq(as_rows(contexts)) == without_seq(rows(tmp_path, "contexts"))
        rejects = as_rows([one for one in expected if one not in contexts])
        assert without_seq(rejects) == without_seq(rows(tmp_path, "rejects"))
        shas = {shard.path: shard.sha256 for shard in Manifest(tmp_path / "manifest.jsonl").shards}
        now = sealed_bytes(tmp_path)
        assert shas == now
        assert sealed.items() <= now.items()
        sealed = now
    assert len(sealed) > 1
