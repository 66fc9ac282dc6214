"""Runs `streamsyn train` as ranks of one training, in forks of a process that has imported torch and peft.

A line of JSON on stdin, `{"argv": [...], "world": n, "port": n, "said": path, "sharded": null or a kind of
`sharding`, "kill": null or see below, "full": null or the rank whose disk is full}`, starts one; in `argv`,
`{rank}` stands for a rank's number. When all its ranks have ended, their exit codes come back as a list,
negative for a signal. Rank i says its lines to `said` + i. An `argv` that begins with `by-hand` runs
`by_hand.main` on the rest in place of a command, and one that begins with `memory`,
`benchmarks.train_memory.rank`.

`kill` is `{"ranks": [i, ...], "at": [[event, part], ...], "after": n}`. Each is an audit event of rank 0
whose first argument has `part` in it; when all have come, one after the other, and `after` (0 by default)
events of any kind after them, these ranks are killed before the last event is done.
"""

import json
import os
import signal
import sys
from typing import Any

import peft  # noqa: F401 - so that no fork has to

from benchmarks import train_memory
from streamsyn.cli.main import main
from streamsyn.trainer.model import head
from tests.trainer import by_hand, tiny
from tests.trainer.fork_server import run
from tests.trainer.sharding import shard

FULL_BYTES = 50_000
"""No file of a rank with a full disk can be larger."""
PROGRAMS = {"by-hand": by_hand.main, "memory": train_memory.rank}
PATIENCE_S = 60
"""A rank that runs for longer hangs: it is ended."""


def watch(victims: list[int], awaited: list[list[str]], after: int) -> None:
    """Kill processes when all that is awaited has come about in this one, and `after` more events."""
    left = after + 1

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if awaited and event == awaited[0][0] and awaited[0][1] in str(arguments[0]):
            del awaited[0]
        if not awaited and victims:
            left -= 1
            if left == 0:
                killed = sorted(victims, key=os.getpid().__eq__)  # this one last
                victims.clear()
                for one in killed:
                    os.kill(one, signal.SIGKILL)

    sys.addaudithook(audit)


def train(task: dict[str, Any]) -> list[int]:
    """The exit codes of all ranks."""
    world, kill = task["world"], task["kill"]
    pids: dict[int, int] = {}
    for rank in reversed(range(world)):  # rank 0 knows the others
        pid = os.fork()
        if pid == 0:
            signal.alarm(PATIENCE_S)
            if world > 1:  # one process has no launcher
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(task["port"])}
            if task["sharded"]:
                shard(task["sharded"])
            if task["piece"]:
                head._PIECE = task["piece"] * tiny.VOCABULARY
            if rank == 0 and kill is not None:
                watch([pids.get(one, os.getpid()) for one in kill["ranks"]], kill["at"], kill.get("after", 0))
            argv = [one.replace("{rank}", str(rank)) for one in task["argv"]]
            told: dict[str, object] = {
                "argv": argv,
                "stderr": f"{task['said']}{rank}",
                "stdin": None,
                "file_bytes": FULL_BYTES if rank == task["full"] else None,
            }
            run(told, PROGRAMS.get(argv[0], main))
        pids[rank] = pid
    return [os.waitstatus_to_exitcode(os.waitpid(pids[rank], 0)[1]) for rank in range(world)]


if __name__ == "__main__":
    tiny.model()  # imports what is imported only then
    for line in sys.stdin:
        print(json.dumps(train(json.loads(line))), flush=True)
    os._exit(0)  # to take torch apart takes seconds
