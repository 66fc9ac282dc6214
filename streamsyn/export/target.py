"""The folder of an export, at a path or an fsspec URL.

`export.json` lists each file before it is created, so that the files of a failed export can be told from
files that others put there. `README.md` is written last: where it exists, the export is complete.
"""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import orjson

from streamsyn.errors import ConfigError
from streamsyn.io.places import names_below, open_url, translated

LISTING = "export.json"
CARD = "README.md"


class Target:
    """A folder to export to. An earlier export in it is removed if `overwrite` is set.

    Raises:
        ConfigError: The folder cannot be used, or holds files that must not be overwritten.
    """

    def __init__(self, url: str, *, overwrite: bool) -> None:
        self._url = url
        self._folders: set[str] = set()
        """The folders that have been created."""
        with self._translated():
            self._filesystem, self._path = open_url(url, "--to")
            if self._filesystem.isfile(self._path):
                raise ConfigError(f"--to: {url} is a file; give a folder")
            if names_below(self._filesystem, self._path):
                self._clear(overwrite=overwrite)
        self._listed: dict[str, dict[str, Any]] = {}

    def open(self, name: str) -> "TargetFile":
        """Create a file."""
        self._listed[name] = {"path": name}
        self._save_listing(complete=False)
        with self._translated():
            return TargetFile(self._url, self._filesystem.open(self._path_of(name), "wb"))

    def record(self, name: str, file: "TargetFile", rows: int) -> None:
        """Record the rows, size and digest of a file that is complete."""
        self._listed[name] |= {"rows": rows, "bytes": file.bytes, "sha256": file.sha256}

    def put(self, name: str, data: bytes) -> None:
        """Write a small file at once."""
        self._listed[name] = {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self._put(name, data)

    def finish(self, card: str) -> None:
        """Write the card, after everything else."""
        data = card.encode()
        self._listed[CARD] = {"path": CARD, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self._save_listing(complete=True)
        self._put(CARD, data)

    @property
    def files(self) -> list[dict[str, Any]]:
        """The listing's entries of the files that hold rows, by path."""
        return [file for _, file in sorted(self._listed.items()) if "rows" in file]

    def _save_listing(self, *, complete: bool) -> None:
        files = [file for _, file in sorted(self._listed.items())]
        data = {"made_by": "streamsyn export", "complete": complete, "files": files}
        self._put(LISTING, orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))

    def _put(self, name: str, data: bytes) -> None:
        with self._translated():
            self._filesystem.pipe_file(self._path_of(name), data)

    def _path_of(self, name: str) -> str:
        path = f"{self._path}/{name}"
        folder = path.rpartition("/")[0]
        if folder not in self._folders:
            self._filesystem.makedirs(folder, exist_ok=True)
            self._folders.add(folder)
        return path

    def _clear(self, *, overwrite: bool) -> None:
        """Remove the files of an earlier export, and nothing else."""
        if not overwrite:
            raise ConfigError(f"--to: {self._url} is not empty; --overwrite replaces an earlier export there")
        listing = f"{self._path}/{LISTING}"
        if not self._filesystem.isfile(listing):
            raise ConfigError(
                f"--to: {self._url} holds no earlier export (it has no {LISTING}); give an empty folder"
            )
        names = _listed_names(self._filesystem.cat_file(listing))
        if names is None:
            raise ConfigError(
                f"--to: {self._url}/{LISTING} was not written by streamsyn; give an empty folder"
            )
        # The card first: without it, the export counts as incomplete.
        for name in sorted(names, key=lambda name: (name != CARD, name)):
            if self._filesystem.isfile(f"{self._path}/{name}"):
                self._filesystem.rm_file(f"{self._path}/{name}")
        self._filesystem.rm_file(listing)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        with translated(f"export to {self._url}"):
            yield


def _listed_names(data: bytes) -> list[str] | None:
    """Return the files that a listing names; None if it is not ours, or names a file outside its folder."""
    try:
        listing = orjson.loads(data)
        names = [file["path"] for file in listing["files"]]
        is_ours = listing["made_by"] == "streamsyn export"
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    is_below = all(isinstance(name, str) and not {"", ".", ".."} & set(name.split("/")) for name in names)
    return names if is_ours and is_below else None


class TargetFile(io.RawIOBase):
    """A file that is being written. Counts and hashes its bytes; raises errors as one-line ConfigErrors."""

    def __init__(self, url: str, file: Any) -> None:
        super().__init__()
        self._url = url
        self._file = file
        self._hash = hashlib.sha256()
        self.bytes = 0

    @property
    def sha256(self) -> str:
        """The SHA-256 of the bytes written so far, in hex."""
        return self._hash.hexdigest()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        with translated(f"export to {self._url}"):
            self._file.write(view)
        self._hash.update(view)
        self.bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self.bytes

    def close(self) -> None:
        if not self.closed:
            super().close()
            with translated(f"export to {self._url}"):
                self._file.close()

    def abandon(self) -> None:
        """Close the file and ignore errors, while another error is raised."""
        super().close()
        with suppress(Exception):
            self._file.close()
