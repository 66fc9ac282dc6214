"""The signals that stop a run or a training.

SIGTERM and SIGINT: the first one drains, a later one ends at once. SIGHUP (the terminal was closed) and
SIGUSR1 (sent by Slurm before the time limit, with `--signal=USR1@60`) only ever drain: a terminal that closes
sends SIGHUP twice, from the kernel and from the shell.
"""

import signal
from typing import Final

GENTLE: Final = (signal.SIGHUP, signal.SIGUSR1)
"""The signals that never end a run at once."""


def stop_signals() -> list[signal.Signals]:
    """Return the signals to handle. What `nohup` or a parent process ignores stays ignored."""
    gentle = [number for number in GENTLE if signal.getsignal(number) is not signal.SIG_IGN]
    return [signal.SIGTERM, signal.SIGINT, *gentle]
