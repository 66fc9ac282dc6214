"""Logs and counters: what a run says of itself. Everything goes to stderr."""

import io
import logging
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import structlog

from streamsyn.records import Context, Outcome, Reject


def configure_logs(*, as_json: bool, level: int = logging.INFO) -> None:
    """Send structlog's events to stderr: plain lines, or one JSON object a line."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=28)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def secure_stdio() -> None:
    """Make stderr one that cannot fail, and keep files of ours from taking the place of a closed stream."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    raw = _LossyFile(2, "wb", closefd=False)
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )


class _LossyFile(io.FileIO):
    """Takes whatever is written, also when nobody reads it any more.

    The terminal or the log collector behind stderr may go away, or its disk may be full: what a run
    says is lost then, and that is no reason to lose the run. Whatever writes to stderr comes through
    here: logs, progress, the summary, and what Python or a library has to say.
    """

    def write(self, data: Any, /) -> int:
        """All of it, or as much as is taken."""
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


@dataclass(slots=True)
class Counters:
    """What this process has done so far; stages add to it, progress and summary read it."""

    started_at: float = field(default_factory=time.monotonic)
    seeds_read: int = 0
    """Lines that were read, good and bad."""
    drafts_read: int = 0
    """Outcomes that they come to: one a bad line, `recipe.contexts_per_seed` a seed."""
    finished_before: int = 0
    """Drafts that an earlier run had finished."""
    repeated: int = 0
    """Seeds skipped because their id had been read before."""
    reading_done: bool = False
    contexts: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    samples: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    useful_tokens: int = 0
    """Completion tokens of contexts."""
    wasted_tokens: int = 0
    """Completion tokens of answers that were thrown away: failed checks, retries, rejects."""
    retries: int = 0

    @property
    def outcomes(self) -> int:
        """Contexts and rejects together."""
        return self.contexts + self.rejects.total()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run started."""
        return time.monotonic() - self.started_at

    def count_outcome(self, outcome: Outcome) -> None:
        """Add one outcome that has been written to the log."""
        self.wasted_tokens += outcome.wasted_tokens
        self.retries += sum(attempt.error is not None for attempt in outcome.attempts)
        match outcome:
            case Context():
                self.contexts += 1
                self.prompt_tokens += outcome.prompt_tokens
                self.cached_tokens += outcome.cached_tokens
                self.useful_tokens += outcome.completion_tokens
            case Reject():
                self.rejects[outcome.reason] += 1
