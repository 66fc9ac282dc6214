"""The limit of open files of this process, which each connection to a server counts against."""

import resource

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
