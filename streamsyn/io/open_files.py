"""The limit of open files of this process, which each connection to a server counts against."""

import resource

import structlog

from streamsyn.config.sections import FleetSection

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
