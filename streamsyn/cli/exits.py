"""Exit codes, and the ways a command ends with one.

0    every seed has an outcome
1    any other error
2    usage or configuration error; the message names the key, the option or the file
3    rejects are more than run.max_reject_fraction of the outcomes, or the first ones all failed in one way;
     running again resumes
4    bench --compare found a regression
75   stopped early (a signal, a closed pipe, no usable server); running again resumes
"""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import click

from streamsyn.plain_text import visible, without_userinfo
from streamsyn.stop_signals import stop_signals

EXIT_OTHER = 1
EXIT_USAGE = 2
EXIT_REJECTS = 3
EXIT_REGRESSION = 4
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later


def fail(text: str, code: int, *, prefix: str = "streamsyn: ", **fields: Any) -> NoReturn:
    """Print `text` to stderr, or log it as run.failed with --log-json, and exit with `code`."""
    text = without_userinfo(text)
    if as_json():
        import structlog

        from streamsyn.telemetry import configure_logs

        configure_logs(as_json=True)
        structlog.get_logger().error("run.failed", error=text, exit_code=code, **fields)
    else:
        click.echo(prefix + visible(text), err=True)
    sys.exit(code)


def as_json() -> bool:
    """Whether --log-json is given. Read from sys.argv, because parsing the options may be what failed."""
    return "--log-json" in sys.argv


def on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Set one handler for all signals that stop a command."""
    for number in stop_signals():
        signal.signal(number, handler)


def stop_early(_number: int, _frame: FrameType | None) -> NoReturn:
    """Handle a signal that arrives before the run has started: exit at once, nothing needs closing.

    Not by SystemExit: it would be raised within whatever import is in progress, and may be swallowed there.
    Measured: one signal in a hundred was lost.
    """
    os._exit(EXIT_STOPPED)
