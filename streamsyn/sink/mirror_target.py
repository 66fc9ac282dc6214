"""The files of a mirror, behind a URL.

A file that must not exist yet is written by a conditional put, which the store decides: `If-None-Match: *` of
S3, `ifGenerationMatch=0` of Google Cloud Storage, `overwrite=False` of Azure, `O_EXCL` of a file system.
fsspec's name for it is `mode="create"`.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamsyn.errors import ConfigError, SinkError
from streamsyn.io.durable import write_whole
from streamsyn.io.places import names_below, open_url
from streamsyn.plain_text import without_userinfo
from streamsyn.sink import shards


class CopyMismatch(SinkError):
    """Raised when a file of the mirror, read back, differs from what was written or listed."""


class NoConditionalPut(SinkError):
    """Raised when a store cannot write a file on condition that it does not exist."""


class MirrorTarget:
    """The mirror's files. Every method may block, and raises whatever its file system raises.

    Names are paths relative to the run directory.

    Args:
        url: Where it is.

    Attributes:
        url: The same without a password, for messages.

    Raises:
        ConfigError: The URL's protocol is unknown, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        from fsspec.implementations.local import LocalFileSystem

        self._filesystem, self._path = open_url(url, "sink.mirror")
        self.url = without_userinfo(url)
        self._is_local = isinstance(self._filesystem, LocalFileSystem)

    def refuse_inside(self, root: Path) -> None:
        """Refuse a mirror inside the run directory that it copies.

        Raises:
            ConfigError: The mirror is inside `root`.
        """
        if self._is_local:
            place = Path(self._path).resolve()
            if place.is_relative_to(root.resolve()):
                raise ConfigError(f"sink.mirror: {place} is inside the run directory: choose a place outside")

    def sizes(self, folder: str) -> dict[str, int]:
        """Sizes in bytes of the files in a folder, by name."""
        below = names_below(self._filesystem, f"{self._path}/{folder}")
        return {f"{folder}/{name}": size for name, size in below.items()}

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None when it does not exist."""
        self._filesystem.invalidate_cache()
        try:
            return b"".join(self._chunks(name))
        except FileNotFoundError:
            return None

    def holds(self, name: str, size: int, sha256: str) -> bool:
        """Whether a file exists with this size and sha256; reads all of it."""
        self._filesystem.invalidate_cache()
        hashed, found = hashlib.sha256(), 0
        try:
            for chunk in self._chunks(name):
                hashed.update(chunk)
                found += len(chunk)
        except FileNotFoundError:
            return False
        return (found, hashed.hexdigest()) == (size, sha256)

    def download(self, name: str, path: Path, size: int, sha256: str) -> None:
        """Copy a file to `path`, and sync it.

        Raises:
            CopyMismatch: It does not exist, or has a different size or sha256.
        """
        hashed = hashlib.sha256()
        if name not in self.sizes(name.rpartition("/")[0]):
            raise CopyMismatch(f"{name}, which the mirror's manifest lists, does not exist")
        with path.open("wb") as file:
            for chunk in self._chunks(name):
                hashed.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            if (file.tell(), hashed.hexdigest()) != (size, sha256):
                raise CopyMismatch(f"{name} is not what the mirror's manifest lists")

    def copy(self, path: Path, name: str) -> None:
        """Copy a file to the mirror, in place of one that exists."""
        self._make_folder(name)
        self._filesystem.put_file(str(path), f"{self._path}/{name}")

    def put(self, name: str, data: bytes) -> None:
        """Write a small file whole, and read it back.

        Raises:
            CopyMismatch: What was read back differs.
        """
        self._make_folder(name)
        if self._is_local:
            write_whole(Path(self._path) / name, data)
        else:
            self._filesystem.pipe_file(f"{self._path}/{name}", data)
        if self.read(name) != data:
            raise CopyMismatch(f"{name} was not read back as it was written")

    def create(self, name: str, content: bytes | Path) -> None:
        """Write a file by a conditional put.

        Args:
            name: The file.
            content: What to write, or the file to copy.

        Raises:
            FileExistsError: It exists; it was not changed.
            NoConditionalPut: The store cannot do this.
        """
        self._make_folder(name)
        place = f"{self._path}/{name}"
        if self._is_local:
            _create_here(Path(place), content)
            return
        if _is_inherited(self._filesystem, "pipe_file"):
            raise NoConditionalPut(f"{self.url}: its file system has no conditional put")
        try:
            if isinstance(content, Path) and not _is_inherited(self._filesystem, "put_file"):
                self._filesystem.put_file(str(content), place, mode="create")
            else:
                data = content.read_bytes() if isinstance(content, Path) else content
                self._filesystem.pipe_file(place, data, mode="create")
        except (NotImplementedError, TypeError) as error:
            raise NoConditionalPut(f"{self.url}: {error}") from error
        except OSError as error:
            # What servers answer that know S3 without this header: 501, NotImplemented.
            if "not implemented" in str(error).lower() or "notimplemented" in str(error).lower():
                raise NoConditionalPut(f"{self.url}: {error}") from error
            raise

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        if self._filesystem.isfile(f"{self._path}/{name}"):
            self._filesystem.rm_file(f"{self._path}/{name}")

    def _make_folder(self, name: str) -> None:
        self._filesystem.makedirs(f"{self._path}/{name}".rpartition("/")[0], exist_ok=True)

    def _chunks(self, name: str) -> Iterator[bytes]:
        with self._filesystem.open(f"{self._path}/{name}", "rb") as file:
            while chunk := file.read(shards.CHUNK_BYTES):
                yield chunk


def _create_here(path: Path, content: bytes | Path) -> None:
    with path.open("xb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, file, shards.CHUNK_BYTES)


def _is_inherited(filesystem: Any, method: str) -> bool:
    """Whether a file system writes as fsspec's base class does, which looks first, and then writes."""
    from fsspec import AbstractFileSystem

    return getattr(getattr(filesystem, method), "__func__", None) is getattr(AbstractFileSystem, method)
