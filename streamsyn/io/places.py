"""Where data lies: a local path, a file or a folder behind a URL, a dataset on the Hugging Face hub.

What lies behind a URL is opened by fsspec; each of its errors becomes one line for the user.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from streamsyn.config.data_paths import HubName
from streamsyn.errors import ConfigError
from streamsyn.plain_text import without_userinfo

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file behind a URL.

    Attributes:
        filesystem: Where it is.
        path: Its path there.
        url: Its URL without credentials, for messages and origins.
    """

    filesystem: "AbstractFileSystem"
    path: str
    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(self.url).name


@dataclass(frozen=True, slots=True)
class RemoteSaved:
    """A directory behind a URL that `datasets.save_to_disk` has written."""

    location: str
    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(self.url).name


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A dataset on the hub, which is streamed."""

    hub: HubName

    def __str__(self) -> str:
        return f"hf://datasets/{self.hub.repository}"

    @property
    def name(self) -> str:
        """The dataset's name without its organisation."""
        return PurePosixPath(self.hub.repository).name


Place: TypeAlias = Path | RemoteFile | RemoteSaved | HubDataset


@contextmanager
def opened(place: Path | RemoteFile) -> Iterator[IO[bytes]]:
    """The bytes of a file.

    Raises:
        OSError: It cannot be opened or read; the errors of remote file systems become OSErrors.
    """
    if isinstance(place, Path):
        with place.open("rb") as file:
            yield file
        return
    with _as_os_errors():
        remote = place.filesystem.open(place.path, "rb")
    with remote:
        yield _Remote(remote)  # type: ignore[misc]  # what readers need of a file


class _Remote:
    """A remote file whose errors are OSErrors: each file system has its own exceptions."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        with _as_os_errors():
            data: bytes = self._file.read(size)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def _as_os_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise OSError(reason(error)) from error


def size_of(place: Path | RemoteFile) -> int | None:
    """The size of a file in bytes; None if its server does not tell.

    Raises:
        OSError: It cannot be found.
    """
    if isinstance(place, Path):
        return place.stat().st_size
    with _as_os_errors():
        size: int | None = place.filesystem.size(place.path)
    return size


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
