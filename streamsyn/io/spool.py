"""A file for what cannot be read twice: a pipe's entries are in it, on disk, before they are acted on.

One entry a line. After a kill the entries are replayed from the file. A torn last line was not acted on, so
it is cut off. So is everything from a page on that never reached the disk, as a loss of power leaves it: the
batch that it belongs to was not synced, and the next one was not begun. Any other damaged line among others
is an error: what follows it was acted on, and cannot be piped again.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final, Generic, TypeVar

from streamsyn.errors import SinkError
from streamsyn.io.durable import make_folder, sync_folder

T = TypeVar("T")

BATCH_ENTRIES: Final = 256
BATCH_BYTES: Final = 256 * 1024
_BLOCK_BYTES: Final = 512
"""Every disk and file system loses whole multiples of this."""


class Spool(Generic[T]):
    """The file of one pipe.

    Args:
        path: The file; it need not exist.
        decode: The entry in a line; None if there is none, because the line is damaged.
    """

    def __init__(self, path: Path, decode: Callable[[bytes], T | None]) -> None:
        self.path = path
        self._decode = decode
        self._file: IO[bytes] | None = None

    def exists(self) -> bool:
        """Whether an earlier run has made the file."""
        return self.path.exists()

    def replay(self, offset: int = 0, lines: int = 0) -> Iterator[list[T]]:
        """All entries of earlier runs, in batches of a bounded size. Call it before the first `append`.

        Args:
            offset: Where to begin, in bytes: the beginning of a line.
            lines: Number of lines before that offset.

        Raises:
            SinkError: A line is damaged that is not the last one (nothing is cut then), or the file cannot
                be used.
        """
        if not self.exists():
            return
        self._sync()
        batch: list[T] = []
        end = begin = offset
        damaged = 0
        for number, line in enumerate(self.lines(offset), lines + 1):
            if damaged:
                raise SinkError(f"{self.path}:{damaged} is damaged; repair or delete that line")
            entry = self._decode(line) if line.endswith(b"\n") else None
            if entry is None:
                damaged = number
                if never_synced(line, end):
                    break
                continue
            end += len(line)
            batch.append(entry)
            if len(batch) == BATCH_ENTRIES or end - begin >= BATCH_BYTES:
                yield batch
                batch, begin = [], end
        if damaged:
            self.cut(end)
        if batch:
            yield batch

    def lines(self, offset: int = 0) -> Iterator[bytes]:
        """The lines from an offset on, with their line ends.

        Raises:
            SinkError: The file cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                yield from file
        except OSError as error:
            raise SinkError(f"cannot read {self.path}: {error.strerror}") from error

    def open(self) -> None:
        """Make the file and its folder if they are missing, and open it for `append`.

        Raises:
            SinkError: It cannot be written.
        """
        if self._file is not None:
            return
        try:
            make_folder(self.path.parent)
            self._file = self.path.open("ab", buffering=0)
            sync_folder(self.path.parent)
        except OSError as error:
            raise self._cannot_write(error) from error

    def append(self, lines: bytes) -> None:
        """Write whole lines, and return when they are on disk.

        Raises:
            SinkError: They cannot be written; the file may end in a part of them.
        """
        assert self._file is not None, "opened"
        try:
            view = memoryview(lines)
            while view:
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error

    def cut(self, size: int) -> None:
        """Remove what is beyond `size` bytes: the part of a batch that `append` could not finish.

        Raises:
            SinkError: The file cannot be changed.
        """
        try:
            os.truncate(self.path, size)
        except OSError as error:
            raise self._cannot_write(error) from error

    def close(self) -> None:
        """Close the file; `open` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "Spool[T]":
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sync(self) -> None:
        """Sync what an earlier run may have written and not synced, before it is acted on."""
        try:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        except IsADirectoryError:
            return  # reading it says so
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> SinkError:
        return SinkError(f"cannot write {self.path}: {error.strerror}")


def never_synced(line: bytes, offset: int) -> bool:
    """Whether a damaged line that begins at `offset` has a page in it that never reached the disk.

    Such a page reads as zeros up to its end. Entries are text: they have no zeros.
    """
    zeros_end = line.rfind(b"\0") + 1
    return zeros_end > 0 and (offset + zeros_end) % _BLOCK_BYTES == 0
