"""What the system gives this process: how many files it may open, and a folder for its temporary files."""

import os
import resource
import tempfile
from pathlib import Path

import structlog

from streamsyn.config.sections import FleetSection
from streamsyn.errors import ConfigError

log = structlog.get_logger()

_OWN_FILES = 128
"""Files of a run itself: its log, SQLite files and mirror, libraries, and requests that control servers."""


def raise_limit() -> int:
    """Raise the soft limit to the hard one, and return it. Soft limits are often 1,024, for old programs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):  # macOS: the kernel allows less than its hard limit
            return soft
    return hard if hard != resource.RLIM_INFINITY else 2**31


def free_files(limit: int, inputs: int) -> int:
    """Return how many of `limit` open files are left for connections.

    Args:
        limit: From `raise_limit`.
        inputs: Files that are read at the same time.
    """
    return max(limit // 2, limit - _OWN_FILES - inputs)


def within_sockets(max_sockets: int, section: FleetSection, servers: int) -> FleetSection:
    """Return `section` with a `max_in_flight` for which there are enough sockets; a lower one is logged."""
    most = max(1, max_sockets // max(1, servers))
    wanted = section.max_in_flight
    if section.concurrency != "auto":
        wanted = min(wanted, section.concurrency)
    if most >= wanted:
        return section
    log.warning(
        "fleet.few_open_files",
        why=f"the limit of open files leaves {max_sockets} for connections: at most {most} requests in "
        f"flight per server instead of {wanted}; raise it with `ulimit -n`",
    )
    return section.model_copy(update={"max_in_flight": most})


def temporary_files_near(output: Path) -> None:
    """Have this process make temporary files beside its output if the system has no folder for them.

    Libraries need them as well, and the processes started from here.

    Args:
        output: A file or folder that is written to; it need not exist yet.

    Raises:
        ConfigError: Nothing can be written there either.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        output = output.absolute()
        folder = next(one for one in (output, *output.parents) if one.is_dir())
        if not os.access(folder, os.W_OK):
            raise ConfigError(
                f"there is no place for temporary files, and {folder} cannot be written either; "
                "set TMPDIR to a directory that can be"
            ) from error
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
