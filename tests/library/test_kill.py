"""A program that iterates over samples is killed with -9, and goes on behind the last sample it took."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import streamsyn
from streamsyn.pipeline.verify import verify
from tests.library.conftest import Server, arguments, pairs

SCRIPT = """
import asyncio, itertools, sys
import streamsyn
from tests.library.conftest import QUICK, pairs

url, out, after = sys.argv[1], sys.argv[2], int(sys.argv[3])

overrides = {**QUICK, "fleet.hedge_tail": False}

async def seeds():
    for pair in pairs(200):
        yield pair

async def main():
    async with streamsyn.open_run(
        out=out, seeds=seeds(), servers=[url], overrides=overrides, preflight=False, after=after, buffer=2
    ) as run:
        async for sample in run:
            print(sample["seq"], sample["seed_id"], flush=True)

asyncio.run(main())
"""


@pytest.mark.crash
@pytest.mark.timeout(180)
def test_a_killed_program_takes_every_sample_once(tmp_path: Path, server: Server) -> None:
    """Requests asked twice are those in flight at a kill; seeds that were accepted are not lost."""
    taken: list[tuple[int, str]] = []
    out, kills = tmp_path / "out", 2
    for kill in range(kills + 1):
        after = taken[-1][0] if taken else -1
        command = [sys.executable, "-c", SCRIPT, server.url, str(out), str(after)]
        root = Path(streamsyn.__file__).parents[1]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
            assert process.stdout is not None
            for line in process.stdout:
                seq, seed_id = line.split()
                taken.append((int(seq), seed_id))
                if kill < kills and len(taken) == 40 * (kill + 1):
                    process.send_signal(signal.SIGKILL)
                    break
    assert [seq for seq, _ in taken] == list(range(200))
    assert {seed_id for _, seed_id in taken} == {pair["id"] for pair in pairs(200)}
    # At most what was in flight, and as much again that was answered and not yet written.
    assert 200 <= len(server.asked) <= 200 + 2 * kills * 8
    assert verify(out)[0] == []


@pytest.mark.crash
@pytest.mark.timeout(180)
async def test_what_was_submitted_before_a_kill_is_worked_on(tmp_path: Path, server: Server) -> None:
    """`submit` has returned: the seeds are on disk, and are not submitted again."""
    out = tmp_path / "out"
    loop = SCRIPT[SCRIPT.index("        async for sample") : SCRIPT.index("asyncio.run(main")]
    submitting = """        print((await run.submit(pairs(50))).accepted, flush=True)
        await run.wait()
"""
    script = SCRIPT.replace("seeds=seeds(), ", "").replace(loop, submitting)

    def killed() -> None:
        command = [sys.executable, "-c", script, server.url, str(out), "-1"]
        root = Path(streamsyn.__file__).parents[1]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "50\n"
            process.send_signal(signal.SIGKILL)

    await asyncio.to_thread(killed)
    async with streamsyn.open_run(**arguments(out, server), keep_open=True) as run:
        assert (await run.submit(pairs(50))).duplicate == 50
        await run.close_seeds()
        assert len([sample async for sample in run]) == 50
