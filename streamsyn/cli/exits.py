"""How a command ends: exit codes, its last line, and signals that come before a run handles them."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import click

EXIT_OTHER = 1
EXIT_USAGE = 2
EXIT_REJECTS = 3
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later


def on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Set one handler for SIGTERM and SIGINT."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def stop_early(_number: int, _frame: FrameType | None) -> NoReturn:
    """Before a run has begun there is nothing to drain, nor to close.

    Not by SystemExit: it is raised wherever the imports are just then, and may be swallowed on its way.
    Measured: one signal of a hundred was lost.
    """
    os._exit(EXIT_STOPPED)


def fail(text: str, code: int, *, prefix: str = "streamsyn: ", **more: Any) -> NoReturn:
    """Say on stderr why, in the form in which the rest is there, and exit."""
    if as_json():
        import structlog

        from streamsyn.telemetry import configure_logs

        configure_logs(as_json=True)
        structlog.get_logger().error("run.failed", error=text, exit_code=code, **more)
    else:
        click.echo(prefix + text, err=True)
    sys.exit(code)


def as_json() -> bool:
    """Whether --log-json is given; asked of the arguments themselves, for they may be what is wrong."""
    return "--log-json" in sys.argv
