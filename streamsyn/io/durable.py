"""Writing files so that they survive a loss of power: a whole file at once, and the entries of a folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamsyn.errors import SinkError


def write_whole(path: Path, data: bytes, *, is_private: bool = False) -> None:
    """Replace a file atomically: after a loss of power at any moment, either the old or the new one is there.

    The data goes to `path` + ".new", which is synced and then renamed.

    Args:
        path: The file.
        data: Its new content.
        is_private: Whether the owner alone may read it.

    Raises:
        SinkError: The file cannot be written.
    """
    aside = path.with_name(path.name + ".new")
    try:
        with open(aside, "wb", opener=_open_private) if is_private else aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise SinkError(f"cannot write {path}: {error.strerror}") from error


def _open_private(path: str, flags: int) -> int:
    fd = os.open(path, flags, 0o600)
    os.fchmod(fd, 0o600)  # it may be there since a kill
    return fd


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents so that they survive a loss of power; one that exists is fine.

    Raises:
        OSError: It cannot be made.
    """
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync_folder(made.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk: without this, a loss of power can lose a new or renamed file."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """Raise an OSError of the block as a SinkError: "cannot `action`: why; what to do"."""
    try:
        yield
    except OSError as error:
        raise SinkError(
            f"cannot {action}: {error.strerror or error}; "
            "what is on disk stays valid: make room and run again to resume"
        ) from error
