"""Runs commands in forks of a process that has imported torch: a test need not wait for that each time.

A line of JSON on stdin, `{"argv": [...], "stderr": path, "stdin": path or null, "file_bytes": n or null}`,
starts one, and `started PID` comes back; when it has ended, `ended PID CODE`, negative for a signal.
"""

import json
import os
import resource
import sys
from collections.abc import Callable

import torch

import streamsyn.trainer.training  # noqa: F401 - the heavy part
from streamsyn.cli.main import main

torch.set_num_threads(1)


def run(task: dict[str, object], program: Callable[[], None] = main) -> None:
    """A command, or another program, as its own process would run it."""
    for number, key, flags in (
        (0, "stdin", os.O_RDONLY),
        (2, "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        opened = os.open(str(task[key] or os.devnull), flags, 0o644)
        os.dup2(opened, number)
    os.dup2(2, 1)
    if task["file_bytes"] is not None:
        limit = int(str(task["file_bytes"]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["streamsyn", *task["argv"]]  # type: ignore[misc]
    try:
        program()
        code: object = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:  # noqa: BLE001 - what Python does at the top of a process
        import traceback

        traceback.print_exc()
        code = 70
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 70)


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        print("started", child, flush=True)
        print("ended", child, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
