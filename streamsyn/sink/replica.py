"""The far side of a mirror: files behind a URL, each read back after it was written."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from streamsyn.errors import ConfigError, SinkError
from streamsyn.sink import frames
from streamsyn.sink.remote import names_below, open_url


class NotTheSame(SinkError):
    """Raised when what is read back is not what was written."""


class Replica:
    """A folder behind a URL. Every method may block, and may raise whatever its file system raises.

    Raises:
        ConfigError: There is no such protocol, or its package is missing.
    """

    def __init__(self, url: str) -> None:
        self._filesystem, self._path = open_url(url, "sink.mirror")

    def refuse_inside(self, root: Path) -> None:
        """A mirror within the directory that it is of would be no copy.

        Raises:
            ConfigError: It is there.
        """
        from fsspec.implementations.local import LocalFileSystem

        if isinstance(self._filesystem, LocalFileSystem):
            place = Path(self._path).resolve()
            if place.is_relative_to(root.resolve()):
                raise ConfigError(f"sink.mirror: {place} lies in the run directory itself")

    def sizes(self, folder: str) -> dict[str, int]:
        """Sizes of the files in a folder, by their path below the mirror."""
        below = names_below(self._filesystem, f"{self._path}/{folder}")
        return {f"{folder}/{name}": size for name, size in below.items()}

    def read(self, name: str) -> bytes | None:
        """A small file; None when there is none."""
        self._filesystem.invalidate_cache()
        try:
            return b"".join(self._chunks(name))
        except FileNotFoundError:
            return None

    def holds(self, name: str, size: int, sha256: str) -> bool:
        """Whether a file is there and is this one, by reading it."""
        self._filesystem.invalidate_cache()
        hashed, found = hashlib.sha256(), 0
        try:
            for chunk in self._chunks(name):
                hashed.update(chunk)
                found += len(chunk)
        except FileNotFoundError:
            return False
        return (found, hashed.hexdigest()) == (size, sha256)

    def copy(self, path: Path, name: str, size: int, sha256: str) -> None:
        """Copy a file, and read it back.

        Raises:
            NotTheSame: What is there now is something else.
        """
        self._make_folder(name)
        self._filesystem.put_file(str(path), f"{self._path}/{name}")
        if not self.holds(name, size, sha256):
            raise NotTheSame(f"{name} was not read back as it was written")

    def put(self, name: str, data: bytes) -> None:
        """Write a small file whole, and read it back.

        Raises:
            NotTheSame: What is there now is something else.
        """
        self._make_folder(name)
        self._filesystem.pipe_file(f"{self._path}/{name}", data)
        if self.read(name) != data:
            raise NotTheSame(f"{name} was not read back as it was written")

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self._filesystem.isfile(f"{self._path}/{name}"):
            self._filesystem.rm_file(f"{self._path}/{name}")

    def _make_folder(self, name: str) -> None:
        self._filesystem.makedirs(f"{self._path}/{name}".rpartition("/")[0], exist_ok=True)

    def _chunks(self, name: str) -> Iterator[bytes]:
        with self._filesystem.open(f"{self._path}/{name}", "rb") as file:
            while chunk := file.read(frames.CHUNK_BYTES):
                yield chunk
