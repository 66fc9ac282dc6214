"""Places behind a URL: opened by fsspec, with one line for each way in which that can fail."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from streamsyn.errors import ConfigError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def open_url(url: str, what: str) -> "tuple[AbstractFileSystem, str]":
    """The file system that a URL or a path leads to, and the path in it, without a slash at its end.

    Args:
        url: As the user gave it.
        what: The option or key that it was given as.

    Raises:
        ConfigError: There is no such protocol, or its package is missing.
        OSError: Whoever is behind it does not answer.
    """
    if not url.strip():
        raise ConfigError(f"{what} is empty")
    from fsspec.core import url_to_fs  # a run without a mirror starts without it

    try:
        filesystem, path = url_to_fs(url)
    except ImportError as error:
        raise ConfigError(f"{what}: {url} needs a package that is not there: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{what}: {url} cannot be used: {error}") from error
    return filesystem, path.rstrip("/")


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn whatever a file system raises into a ConfigError: each has errors of its own."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"cannot {what}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """One line for why a file system failed."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())


def names_below(filesystem: "AbstractFileSystem", path: str) -> dict[str, int]:
    """Names and sizes of what lies in a folder; none where there is no folder."""
    filesystem.invalidate_cache()
    try:
        listed: list[dict[str, Any]] = filesystem.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    # Object stores may list the folder itself.
    return {
        entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry.get("size") or 0
        for entry in listed
        if entry["name"].strip("/") != path.strip("/")
    }
