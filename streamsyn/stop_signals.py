"""The signals that stop a run or a training.

SIGTERM and SIGINT: the first one drains, a later one ends at once. SIGHUP (the terminal was closed) and
SIGUSR1 (sent by Slurm before the time limit, with `--signal=USR1@60`) only ever drain: a terminal that closes
sends SIGHUP twice, from the kernel and from the shell.
"""

import os
import signal
import threading
from typing import Final

GENTLE: Final = (signal.SIGHUP, signal.SIGUSR1)
"""The signals that never end a run at once."""


def stop_signals() -> list[signal.Signals]:
    """Return the signals to handle. What `nohup` or a parent process ignores stays ignored."""
    gentle = [number for number in GENTLE if signal.getsignal(number) is not signal.SIG_IGN]
    return [signal.SIGTERM, signal.SIGINT, *gentle]


def stop_with_parent() -> None:
    """Have this process get SIGTERM when its stdin ends: its parent, which holds the other end, has died."""

    def watch() -> None:
        while os.read(0, 4096):
            continue
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
