"""The fencing epoch of a run directory: of several processes that have it open, only the newest one writes.

The lock of a directory keeps a second process of the same machine out. On a shared file system locks are not
trusted, and a process that was paused for an hour goes on as if nothing had happened. So each opening claims
an epoch: a file `epochs/0000000N`, created exclusively, which only one of several processes can do. It then
deletes the files of the epochs before: a process whose file is gone has been taken over, and stops.

Looking whether the file is still there, and then writing, is not one step: a process that is paused in
between writes late. So whoever takes over replaces each file that others may have open by a copy, and has
SQLite files of its own. What an older process writes then goes to files without a name. This needs an order
of steps in every process, which is the contract of `Epoch.check`:

    open a file to write, check, write        what is open at a check, a later epoch replaces
    write, sync, check, rely on it            what is synced at a check, a later epoch copies
"""

import errno
import os
import platform
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson
import structlog

from streamsyn.errors import SinkError, TakenOver
from streamsyn.io.durable import make_folder, sync_folder

log = structlog.get_logger()

FOLDER: Final = "epochs"
_INDEX: Final = "index"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_COPIED: Final = ("journal.sqlite", "ids.sqlite")
"""SQLite files that cannot be made from the log."""
_CHUNK_BYTES: Final = 1 << 20
_TOKEN: Final = re.compile(r"\d{8}", re.ASCII)
_LAST: Final = 99_999_999
_EPOCH_OF_LINE: Final = re.compile(rb',"epoch":(\d{1,8})}\n\Z')
"""The end of a line of the manifest."""


class Epoch:
    """One opening of a run directory for writing. Any number of threads may use it.

    Args:
        root: The run directory.
        number: Of the epoch; 0 is for a directory that only this process knows.
        token: Its file, open; it is closed by `close`.
    """

    def __init__(self, root: Path, number: int = 0, token: int | None = None) -> None:
        self.root = root
        self.number = number
        self._path = root / FOLDER / f"{number:08d}"
        self.took_over = False
        """Whether an older process may be alive."""
        self._token = token
        self._lost = ""

    def lose(self, why: str) -> None:
        """Have every check fail from now on: a different run has taken the mirror of this directory."""
        self._lost = why

    @cached_property
    def _index(self) -> Path:
        """The folder of the SQLite files: a new one since the last epoch that took over."""
        return max(self.root.glob(f"{_INDEX}-*"), default=self.root / _INDEX)

    def check(self) -> None:
        """Make sure that this epoch is still the newest.

        Raises:
            TakenOver: It is not.
            SinkError: The file system does not answer.
        """
        if self._lost:
            raise TakenOver(self._lost)
        if not self.number:
            return
        try:
            # Not `stat`: an NFS client asks its server whenever a file is opened (close-to-open consistency).
            os.close(os.open(self._path, os.O_RDONLY))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise SinkError(f"cannot read {self._path}: {error.strerror}") from error
            newest = _newest_owner(self.root / FOLDER)
            raise TakenOver(
                f"{self.root} was taken over by {newest}: this process has stopped, and writes nothing more"
            ) from None

    def database(self, name: str) -> Path:
        """The path of one of the SQLite files that no other process that is alive has open."""
        is_first = self._index.name == _INDEX
        return self.root / name if is_first and name == "journal.sqlite" else self._index / name

    def aside(self, name: str) -> Path:
        """A path for a file that is renamed once it is whole."""
        return self._index / f"{name}.new"

    def take_over(self, growing: Sequence[str]) -> None:
        """Leave older processes, which may be alive, nothing that they can write to.

        Args:
            growing: Patterns of the files that a process holds open to write.

        Raises:
            TakenOver: A newer process has done the same.
            OSError: The disk failed.
        """
        self._index = self._copied_index(self.root / f"{_INDEX}-{self.number:08d}")
        for pattern in growing:
            for path in self.root.glob(pattern):
                self.replace(path)
        self.check()
        for stale in (*self.root.glob("journal.sqlite*"), *self.root.glob(f"{_INDEX}/inbox.sqlite*")):
            stale.unlink(missing_ok=True)
        for stale in (*self.root.glob(f"{_INDEX}-*"), *self.root.glob(f".{_INDEX}-*")):
            if stale.name.lstrip(".") < self._index.name:
                shutil.rmtree(stale, ignore_errors=True)

    def _copied_index(self, folder: Path) -> Path:
        """Make the folder of the SQLite files, whole or not at all: a later epoch copies from it."""
        aside = folder.with_name(f".{folder.name}")
        make_folder(aside)
        for name in _COPIED:
            for part in ("", "-wal"):  # a copy in the middle of a write is found damaged, and dropped
                old = self.database(name)
                with suppress(FileNotFoundError), old.with_name(old.name + part).open("rb") as source:
                    _copy(source, aside / f"{name}{part}")
        sync_folder(aside)
        aside.rename(folder)
        sync_folder(self.root)
        return folder

    def replace(self, path: Path) -> None:
        """Put a copy in the place of a file, if it is there: who has it open writes to the old one.

        Raises:
            TakenOver, OSError: As `take_over`.
        """
        with suppress(FileNotFoundError), path.open("rb") as source:
            aside = self.aside(path.name)
            _copy(source, aside)
            self.check()
            aside.replace(path)
            sync_folder(path.parent)

    def keep_name(self, file: int, path: Path) -> int:
        """Make sure that a file that is being written has its name: an older process may just have moved it.

        Args:
            file: The file, open to read and append.
            path: Its name.

        Returns:
            The file to go on with: a copy, where the name was lost.

        Raises:
            TakenOver, OSError: As `take_over`.
        """
        if not self.number or _is_named(file, path):
            return file
        self.check()
        aside = self.aside(path.name)
        copy = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        try:
            with open(file, "rb", closefd=False) as source, open(copy, "wb", closefd=False) as target:
                source.seek(0)
                shutil.copyfileobj(source, target, _CHUNK_BYTES)
            os.fsync(copy)
            self.check()
            aside.replace(path)
            sync_folder(path.parent)
        except BaseException:
            os.close(copy)
            raise
        os.close(file)
        log.warning("epoch.name_restored", path=str(path), epoch=self.number)
        return copy

    def settle(self, *, is_locked: bool) -> None:
        """Record who this is, now that no older process can write to any file that is used.

        Args:
            is_locked: Whether this process holds the lock of the directory.

        Raises:
            OSError: The disk failed.
        """
        owner = {
            "pid": os.getpid(),
            "host": platform.node(),
            "boot": boot_id(),
            "locked": is_locked,
            "at": time.time(),
        }
        self._note(owner)

    def close(self) -> None:
        """Record that this process has closed all its files, and will write no more."""
        if self._token is not None:
            with suppress(OSError):  # then the next process takes over instead of going on
                self._note({"closed": True})
            os.close(self._token)
            self._token = None

    def _note(self, line: dict[str, Any]) -> None:
        assert self._token is not None, "claimed"
        os.write(self._token, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        os.fsync(self._token)


def claim(root: Path, growing: Sequence[str], *, is_locked: bool) -> Epoch:
    """Claim the next epoch of a run directory; from then on all older processes are refused.

    Args:
        root: The run directory.
        growing: Patterns of the files that a process holds open to write; without any, whoever opens such
            files replaces them if the epoch `took_over`.
        is_locked: Whether this process holds the lock of the directory.

    Raises:
        TakenOver: A newer process has claimed one meanwhile.
        SinkError: There are no more epochs.
        OSError: The disk failed.
    """
    folder = root / FOLDER
    make_folder(folder)
    while True:
        before = _tokens(folder)
        # The folder may be lost, and a mirror has none: lines of a lower epoch would not count.
        known = _newest_line(root / "manifest.jsonl")
        number = max([known, *before]) + 1
        if number > _LAST:
            raise SinkError(f"{folder} has the last epoch, {_LAST}: no run has come so far; delete that file")
        path = folder / f"{number:08d}"
        try:
            token = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        except FileExistsError:
            continue
        sync_folder(folder)
        if _tokens(folder)[-1] == number:
            break
        os.close(token)  # the folder was listed from a cache, before a newer process had claimed its epoch
        path.unlink(missing_ok=True)
    newest = folder / f"{before[-1]:08d}" if before else None
    is_clean = not known if newest is None else _is_over(newest, is_locked=is_locked)
    for older in before:
        (folder / f"{older:08d}").unlink(missing_ok=True)
    sync_folder(folder)
    epoch = Epoch(root, number, token)
    epoch.took_over = not is_clean
    if growing and not is_clean:
        try:
            epoch.take_over(growing)
        except OSError:
            epoch.check()  # a newer process removes what an older one had begun to make
            raise
    epoch.settle(is_locked=is_locked)
    return epoch


def writer(root: Path, lock_holder: str | None) -> str | None:
    """Name the process that may write to a run directory; None if it is known that none does.

    Args:
        root: The run directory.
        lock_holder: The process that holds the lock: it may have been taken over.
    """
    try:
        newest = root / FOLDER / f"{_tokens(root / FOLDER)[-1]:08d}"
    except (OSError, IndexError):
        return lock_holder
    owner, closed = _read(newest)
    if closed:
        return None
    if owner.get("locked", True):
        return lock_holder
    if owner.get("boot") == boot_id() != "" and not Path(f"/proc/{owner.get('pid')}").exists():
        return None
    return f"pid {owner.get('pid')} on {owner.get('host')}, which took over"


def _copy(source: BinaryIO, to: Path) -> None:
    """Copy an open file, synced."""
    with to.open("wb") as copy:
        shutil.copyfileobj(source, copy, _CHUNK_BYTES)
        copy.flush()
        os.fsync(copy.fileno())


def _is_named(file: int, path: Path) -> bool:
    """Whether `path` is a name of an open file."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _tokens(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if _TOKEN.fullmatch(path.name))


def _newest_line(manifest: Path) -> int:
    """The newest epoch that a line of the manifest names; 0 where none does."""
    try:
        with manifest.open("rb") as lines:
            return max((int(found[1]) for line in lines if (found := _EPOCH_OF_LINE.search(line))), default=0)
    except FileNotFoundError:
        return 0


def _is_over(token: Path, *, is_locked: bool) -> bool:
    """Whether the process of an epoch can write no more, for certain.

    It has closed everything; or it ran under this kernel with the lock that this process holds now.
    """
    owner, closed = _read(token)
    held_here = owner.get("locked") and owner.get("boot") == boot_id() != ""
    return closed or bool(is_locked and held_here)


def _read(token: Path) -> tuple[dict[str, Any], bool]:
    """Who claimed an epoch, and whether it has closed everything; nothing of one that has not settled."""
    try:
        lines = [orjson.loads(line) for line in token.read_bytes().splitlines()]
    except (OSError, orjson.JSONDecodeError):
        return {}, False
    if not all(isinstance(line, dict) for line in lines):
        return {}, False
    return (lines[0] if lines else {}), any(line.get("closed") for line in lines)


def _newest_owner(folder: Path) -> str:
    try:
        number = _tokens(folder)[-1]
    except (OSError, IndexError):
        return "another process"
    owner, _ = _read(folder / f"{number:08d}")
    who = f"pid {owner['pid']} on {owner.get('host')}" if "pid" in owner else "another process"
    return f"{who} (epoch {number})"


def boot_id() -> str:
    """What identifies the running kernel; "" where that is not known."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
