"""SIGKILL at random moments of a process that writes the log as fast as it can."""

# ruff: noqa: SIM300 - what is expected stands first

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from streamsyn.records import Context
from streamsyn.sink.finished import Claim
from streamsyn.sink.manifest import Manifest
from streamsyn.sink.rundir import RunDirectory
from tests.builders import COMPRESSIONS, as_rows, opened, outcome, rows, sealed_bytes, sink

WRITER = """
import sys
from pathlib import Path
from streamsyn.sink.rundir import RunDirectory
from streamsyn.sink.runlog import RunLog
from tests.builders import outcome, sink

root, compression, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
directory = RunDirectory(root)
log = RunLog(root, sink(compression=compression, shard_bytes=4000))
print(log.outcomes, flush=True)
while True:
    batch = [outcome(number + n) for n in range(1 + number % 7)]
    log.append(batch)
    number += len(batch)
    if number % 3 == 0:
        log.sync()
    print(number, flush=True)
"""


def write_and_kill(root: Path, compression: str, number: int, lines: int) -> tuple[int, int]:
    """Write on from `number`, kill after so many lines of output; outcomes found and last reported."""
    command = [sys.executable, "-c", WRITER, str(root), compression, str(number)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        found = reported = int(writer.stdout.readline())
        for _ in range(lines):
            reported = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        for line in writer.stdout.read().splitlines(keepends=True):  # said before the kill came
            if line.endswith("\n"):
                reported = int(line)
    assert -signal.SIGKILL == writer.returncode
    return found, reported


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_kill_loses_and_doubles_nothing(tmp_path: Path, compression: str) -> None:
    """What `append` returned from is there after SIGKILL; each outcome is there once; sealed shards stay."""
    draw, number, sealed = random.Random(compression), 0, dict[str, str]()
    for _ in range(5):
        found, reported = write_and_kill(tmp_path, compression, number, draw.randrange(40))
        RunDirectory(tmp_path).close()  # the lock went with the process
        with opened(tmp_path, sink(compression=compression, shard_bytes=4000)) as log:
            assert number == found
            assert reported <= log.outcomes <= reported + 7
            number = log.outcomes
            claims = log.claims()
            known = [claims.claim(outcome(n).key) for n in range(number + 1)]
            claims.close()
        assert [Claim.FINISHED] * number + [Claim.NEW] == known
        expected = [outcome(n) for n in range(number)]
        contexts = [one for one in expected if isinstance(one, Context)]
        assert as_rows(contexts) == rows(tmp_path, "contexts")
        assert as_rows([one for one in expected if one not in contexts]) == rows(tmp_path, "rejects")
        shas = {shard.path: shard.sha256 for shard in Manifest(tmp_path / "manifest.jsonl").shards}
        now = sealed_bytes(tmp_path)
        assert shas == now
        assert sealed.items() <= now.items()
        sealed = now
    assert len(sealed) > 1
