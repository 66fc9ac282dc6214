"""The files of OpenAI's Files API: uploaded inputs, and the outputs of batches while they grow.

ROOT/files/ID/meta.json   what is known of the file; without it the file was never created completely
ROOT/files/ID/content     its bytes
"""

import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, Any, Final, Literal, Self

import orjson
import structlog
from pydantic import BaseModel, ValidationError

from streamsyn.background import finished_in_thread, in_threads
from streamsyn.errors import SinkError
from streamsyn.io.durable import disk_errors, make_folder, sync_folder, write_whole

log = structlog.get_logger()

Purpose = Literal["batch", "batch_output"]

META: Final = "meta.json"
CONTENT: Final = "content"
_UNFINISHED: Final = ".upload-"
_ID: Final = re.compile(r"file-[a-z0-9-]{1,58}")
_READ_BYTES: Final = 2**18


class FileRecord(BaseModel):
    """What is known of a file: the content of meta.json.

    Attributes:
        id: Its id.
        created_at: When it was created, in Unix seconds.
        filename: The name that its client gave it.
        purpose: `batch` for an input, `batch_output` for what a batch writes.
        bytes: Its size; that of an output grows.
    """

    id: str
    created_at: float
    filename: str
    purpose: Purpose
    bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """The file as OpenAI's API shows it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": int(self.created_at),
            "expires_at": None,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class Upload:
    """A file that is being received. Its calls block on the disk, and raise SinkError if that fails."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.bytes = 0
        self._folder = root / f"{_UNFINISHED}{secrets.token_hex(8)}"
        self._file: IO[bytes] | None = None

    def open(self) -> Self:
        """Make the file."""
        with disk_errors(f"write {self._folder}"):
            self._folder.mkdir()
            self._file = (self._folder / CONTENT).open("wb")
        return self

    def write(self, data: bytes) -> None:
        """Add bytes."""
        assert self._file is not None, "opened"
        with disk_errors(f"write {self._folder}"):
            self._file.write(data)
        self.bytes += len(data)

    def finish(self, record: FileRecord) -> None:
        """Keep the file, so that it survives a loss of power."""
        assert self._file is not None, "opened"
        with disk_errors(f"write {self._folder}"):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            write_whole(self._folder / META, orjson.dumps(record.model_dump(mode="json")))
            self._folder.rename(self._root / record.id)
            sync_folder(self._root)

    def discard(self) -> None:
        """Remove what is left of a file that was not finished."""
        if self._file is not None:
            self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class Files:
    """All files. For one event loop; `load` first.

    Args:
        root: ROOT/files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._records: dict[str, FileRecord] = {}

    def load(self) -> None:
        """Find the files of earlier processes, and remove what their uploads left. Blocks on the disk.

        Raises:
            SinkError: The directory cannot be used.
        """
        with disk_errors(f"use {self.root}"):
            make_folder(self.root)
            for folder in self.root.iterdir():
                if folder.name.startswith(_UNFINISHED):
                    shutil.rmtree(folder, ignore_errors=True)
        found = sorted(_records(self.root), key=lambda record: (record.created_at, record.id))
        self._records = {record.id: record for record in found}

    def get(self, file_id: str) -> FileRecord | None:
        """Return what is known of a file; None if there is none with this id."""
        return self._records.get(file_id)

    def newest_first(self, purpose: str | None = None) -> list[FileRecord]:
        """Return all files, or those with a purpose."""
        found = [one for one in self._records.values() if purpose in {None, one.purpose}]
        return found[::-1]

    def content_path(self, file_id: str) -> Path:
        """Return where the bytes of a file are."""
        return self.root / file_id / CONTENT

    @asynccontextmanager
    async def upload(self) -> AsyncIterator[Upload]:
        """Receive a file in the block; unless it is kept with `keep`, it is removed at the end.

        Raises:
            SinkError: The disk failed.
        """
        upload = Upload(self.root)
        try:
            await finished_in_thread(upload.open)
            yield upload
        finally:
            await finished_in_thread(upload.discard)

    async def keep(self, upload: Upload, filename: str) -> FileRecord:
        """Keep what was received as an input of batches; on return it survives a loss of power.

        Raises:
            SinkError: The disk failed.
        """
        record = FileRecord(
            id=new_id(), created_at=time.time(), filename=filename, purpose="batch", bytes=upload.bytes
        )
        await finished_in_thread(upload.finish, record)
        self._records[record.id] = record
        return record

    async def make_output(self, file_id: str, filename: str) -> FileRecord:
        """Return the file that a batch writes; it is made empty if it does not exist.

        Raises:
            SinkError: The disk failed.
        """
        if (known := self._records.get(file_id)) is not None:
            return known
        record = FileRecord(id=file_id, created_at=time.time(), filename=filename, purpose="batch_output")
        upload = Upload(self.root)
        await finished_in_thread(lambda: upload.open().finish(record))
        self._records[file_id] = record
        return record

    async def delete(self, file_id: str) -> None:
        """Remove a file."""
        self._records.pop(file_id, None)
        folder = self.root / file_id
        aside = self.root / f"{_UNFINISHED}{secrets.token_hex(8)}"  # which a kill does not leave half removed

        def remove() -> None:
            with disk_errors(f"delete {folder}"):
                folder.rename(aside)
                sync_folder(self.root)
            shutil.rmtree(aside, ignore_errors=True)

        await finished_in_thread(remove)

    async def chunks(self, record: FileRecord) -> AsyncGenerator[bytes, None]:
        """Yield the first `record.bytes` bytes of a file, as they are at the first call.

        Raises:
            SinkError: The file cannot be read.
        """
        left, path = record.bytes, self.content_path(record.id)
        async with in_threads(_reading(path)) as file:
            while left:
                data = await finished_in_thread(file.read, min(left, _READ_BYTES))
                if not data:
                    raise SinkError(f"{path} is shorter than it was")
                left -= len(data)
                yield data


@contextmanager
def _reading(path: Path) -> Iterator[IO[bytes]]:
    with disk_errors(f"read {path}"), path.open("rb") as file:
        yield file


def new_id() -> str:
    """Return an id for a file."""
    return f"file-{secrets.token_hex(12)}"


def _records(root: Path) -> Iterator[FileRecord]:
    for folder in root.iterdir():
        if _ID.fullmatch(folder.name) is None:
            continue
        try:
            record = FileRecord.model_validate(orjson.loads((folder / META).read_bytes()))
            record.bytes = (folder / CONTENT).stat().st_size
        except (OSError, orjson.JSONDecodeError, ValidationError) as error:
            log.warning("files.damaged", path=str(folder), why=str(error).splitlines()[0], then="not listed")
            continue
        if record.id == folder.name:
            yield record
