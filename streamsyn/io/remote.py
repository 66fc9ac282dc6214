"""Folders behind URLs, opened by fsspec; each failure becomes one line for the user."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from streamsyn.errors import ConfigError
from streamsyn.urls import without_userinfo

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def open_url(url: str, what: str) -> "tuple[AbstractFileSystem, str]":
    """The file system of a URL or a path, and the path within it, without a slash at its end.

    Args:
        url: As the user gave it.
        what: The option or the configuration key that it was given as, for messages.

    Raises:
        ConfigError: The protocol is unknown, or its package is not installed.
        OSError: The server does not answer.
    """
    if not url.strip():
        raise ConfigError(f"{what} is empty")
    from fsspec.core import url_to_fs  # imported here, so that a run without a mirror starts faster

    try:
        filesystem, path = url_to_fs(url)
    except ImportError as error:
        raise ConfigError(f"{what}: {url} needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{what}: {url} cannot be used: {error}") from error
    return filesystem, path.rstrip("/")


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn any error of a file system into a ConfigError: each file system has its own exceptions."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"cannot {what}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The reason why a file system failed, in one line, without passwords of URLs."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return without_userinfo(" ".join(f"{type(error).__name__}: {error}".split()))


def names_below(filesystem: "AbstractFileSystem", path: str) -> dict[str, int]:
    """The names in a folder, with sizes in bytes; empty if there is no folder."""
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
