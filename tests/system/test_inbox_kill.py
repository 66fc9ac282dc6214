"""SIGKILL within a request with an idempotency key: what it left, and how the same request is answered."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from streamsyn.config.sections import SeedsSection
from streamsyn.records import Seed
from streamsyn.seeds.inbox import Inbox, InboxSource
from streamsyn.seeds.submission import Submitted

pytestmark = pytest.mark.crash

SUBMIT = """
import os, signal, sys
from pathlib import Path
from streamsyn.config.sections import SeedsSection
from streamsyn.seeds.inbox import Inbox

inbox, when = Inbox(Path(sys.argv[1]), SeedsSection()), sys.argv[2]
fsync = os.fsync

def kill(fd):
    is_file = os.readlink(f"/proc/self/fd/{fd}").endswith("seeds.jsonl")
    if not (is_file and when == "before the sync"):
        fsync(fd)
    if is_file:
        os.kill(os.getpid(), signal.SIGKILL)

inbox.open()
if when == "before the answer":
    write = inbox._file._spool.append
    inbox._file._spool.append = lambda data: write(data[: data.index(b'{"answer"')])
os.fsync = kill
inbox.submit([line.encode() for line in sys.argv[3:]], key="k")
"""
LINES = [f'{{"instruction": "What is {n}?", "answer": "{n}."}}' for n in range(3)]
LEFT = {
    "before the sync": Submitted(accepted=3),  # the process is gone, not the power: the lines were written
    "before the answer": Submitted(duplicate=3),
    "after the sync": Submitted(accepted=3),
}


@pytest.mark.parametrize("when", LEFT)
def test_a_kill_within_a_request(tmp_path: Path, when: str) -> None:
    """Each seed is accepted once; the answer is the first one, unless that was never written."""
    command = [sys.executable, "-c", SUBMIT, str(tmp_path), when, *LINES]
    killed = subprocess.run(command, capture_output=True, timeout=30, check=False)
    with Inbox(tmp_path, SeedsSection()) as inbox:
        again = inbox.submit([line.encode() for line in LINES], key="k")
        third = inbox.submit([line.encode() for line in LINES], key="k")
        source = InboxSource(inbox, waits=False)
        seeds = [entry for batch in source.batches() for entry in batch if isinstance(entry, Seed)]

    assert -signal.SIGKILL == killed.returncode, killed.stderr.decode()
    assert LEFT[when] == again == third
    assert ["What is 0?", "What is 1?", "What is 2?"] == [seed.instruction for seed in seeds]
