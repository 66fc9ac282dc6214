"""The disk under a run: what it does to its files is recorded, and replayed to any moment of a crash.

`recorded` notes the calls of this process that change files under a folder, in their order. `Disk` replays
them, and knows what is synced and what is not, so that it can say what a disk may hold after a kill (all
that was written, the last write perhaps in part) or a loss of power (what was synced, and any part of the
rest: folders lose their last changes, files lose their ends, sizes or pages). The method is that of ALICE
(Pillai et al., OSDI 2014) and CrashMonkey (Mohan et al., OSDI 2018).

SQLite writes its files past Python. They are derived data that SQLite keeps whole, so they are copied as
they are at each call; a loss of power leaves an earlier copy, or none.
"""

import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from threading import RLock
from typing import Any
from unittest import mock

_BLOCK = 512
_SCRATCH = "read.sqlite"
"""Deleted by the next run, whatever is in it."""

Content = dict[str, bytes]
"""Files by their paths below the folder."""


@dataclass(frozen=True, slots=True)
class Call:
    """One change: `create`, `write`, `truncate`, `sync`, `rename`, `unlink`, `mkdir` or `stdout`.

    Attributes:
        kind: What was called.
        path: The file or folder, below the folder that is recorded.
        target: Of a rename, the new path.
        data: Of a write, or to stdout.
        offset: Where a write begins; of a truncation, the new size.
        derived: The SQLite files after the call.
    """

    kind: str
    path: str
    target: str = ""
    data: bytes = b""
    offset: int = 0
    derived: Content = field(default_factory=dict)


class _Recorder:
    def __init__(self, root: Path, stdout: int | None) -> None:
        self.calls: list[Call] = []
        self._root = str(root.resolve())
        self._stdout = None if stdout is None else os.fstat(stdout).st_ino
        self._lock = RLock()
        self._derived: dict[str, tuple[tuple[int, int], bytes]] = {}

    def below(self, path: Any) -> str | None:
        """The path below the folder; None if it is elsewhere or SQLite's."""
        path = Path(path) if not isinstance(path, int) else Path(f"/proc/self/fd/{path}").readlink()
        full = str(path.parent.resolve() / path.name)
        inside = full == self._root or full.startswith(self._root + "/")
        is_ours = inside and ".sqlite" not in full and not full.endswith(" (deleted)")
        return full[len(self._root) + 1 :] if is_ours else None

    def is_stdout(self, fd: int) -> bool:
        return self._stdout is not None and os.fstat(fd).st_ino == self._stdout

    @contextmanager
    def call(self, kind: str, path: str | None, **given: Any) -> Iterator[None]:
        """Note a call that the block makes, unless it fails; the order of notes is that of the calls."""
        with self._lock:
            yield
            if path is not None:
                self.calls.append(Call(kind, path, derived=self._sqlite_files(), **given))

    def _sqlite_files(self) -> Content:
        # A write-ahead log before its file: frames that the file has already do no harm.
        for path in sorted(Path(self._root).rglob("*.sqlite*"), reverse=True):
            if path.name.endswith("-shm") or path.name.startswith(_SCRATCH):
                continue
            with suppress(FileNotFoundError):
                found = path.stat()
                version, name = (found.st_mtime_ns, found.st_size), str(path.relative_to(self._root))
                if self._derived.get(name, (None, b""))[0] != version:
                    self._derived[name] = (version, path.read_bytes())
        here = {str(path.relative_to(self._root)) for path in Path(self._root).rglob("*.sqlite*")}
        self._derived = {name: kept for name, kept in self._derived.items() if name in here}
        return {name: data for name, (_, data) in self._derived.items()}


class _RecordedFile(io.FileIO):
    """A file below the folder, opened by `open` to be written."""

    def __init__(self, recorder: _Recorder, path: str, file: Any, mode: str) -> None:
        self._recorder = recorder
        self._path = path
        with recorder.call("create", path if "w" in mode or not Path(file).exists() else None):
            super().__init__(file, mode)
        with recorder.call("truncate", path if "w" in mode else None):
            pass  # `open` has done it

    def write(self, data: Any, /) -> int:
        offset = os.fstat(self.fileno()).st_size if "a" in self.mode else self.tell()
        with self._recorder.call("write", self._path, data=bytes(data), offset=offset):
            return super().write(data)


@contextmanager
def recorded(root: Path, stdout: int | None = None) -> Iterator[list[Call]]:
    """Note what this process does to the files below `root` while the block runs.

    Args:
        root: The folder.
        stdout: A file descriptor; what is written to the same pipe is noted as `stdout`.

    Yields:
        The calls, which grow.
    """
    recorder = _Recorder(root, stdout)
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "ftruncate", "truncate", "mkdir")}
    real |= {name: getattr(os, name) for name in ("rename", "replace", "unlink")}
    real_open = io.open

    def opened(path: Any, flags: int, *args: Any, **options: Any) -> int:
        below = recorder.below(path) if flags & os.O_CREAT and not Path(path).exists() else None
        with recorder.call("create", below):
            fd: int = real["open"](path, flags, *args, **options)
            return fd

    def wrote(fd: int, data: Any) -> int:
        if recorder.is_stdout(fd):
            with recorder.call("stdout", "", data=bytes(data)):
                return int(real["write"](fd, data))
        below = recorder.below(fd) if stat.S_ISREG(os.fstat(fd).st_mode) else None
        offset = os.fstat(fd).st_size if below is not None else 0
        with recorder.call("write", below, data=bytes(data), offset=offset):
            return int(real["write"](fd, data))

    def noting(name: str, kind: str) -> Callable[..., None]:
        def noted(path: Any, *args: Any, **options: Any) -> None:
            below, given = recorder.below(path), {}
            if kind == "rename":
                given = {"target": recorder.below(args[0]) or ""}
            elif kind == "truncate":
                given = {"offset": args[0]}
            with recorder.call(kind, below, **given):
                real[name](path, *args, **options)

        return noted

    def file_opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
        below = None if isinstance(file, int) or not set(mode) & set("wa+x") else recorder.below(file)
        if below is None:
            return real_open(file, mode, buffering, *args, **options)
        assert "b" in mode, "only bytes are written below the folder"
        raw = _RecordedFile(recorder, below, file, mode)
        return raw if buffering == 0 else io.BufferedWriter(raw)

    with (
        mock.patch.multiple(
            os,
            open=opened,
            write=wrote,
            fsync=noting("fsync", "sync"),
            ftruncate=noting("ftruncate", "truncate"),
            truncate=noting("truncate", "truncate"),
            mkdir=noting("mkdir", "mkdir"),
            rename=noting("rename", "rename"),
            replace=noting("replace", "rename"),
            unlink=noting("unlink", "unlink"),
        ),
        mock.patch.object(io, "open", file_opened),
    ):
        yield recorder.calls


@dataclass(slots=True)
class _File:
    """A file: what it holds, and what a loss of power leaves for certain."""

    data: bytes = b""
    synced: bytes = b""


_Change = list[tuple[str, "_File | None"]]
"""Entries of a folder that change together."""


class Disk:
    """Files and folders after some calls.

    Args:
        start: What was there before the first call, synced.
    """

    def __init__(self, start: Content) -> None:
        self.stdout = b""
        """What was written to stdout."""
        self.derived: Content = {name: data for name, data in start.items() if ".sqlite" in name}
        """SQLite files."""
        self._old: list[Content] = [self.derived]
        self._entries: dict[str, dict[str, _File]] = {"": {}}
        self._unsynced: dict[str, list[_Change]] = {}
        for path, data in start.items():
            if ".sqlite" not in path:
                self._entries.setdefault(_folder_of(path), {})[path] = _File(data, data)
        self._synced = {folder: dict(entries) for folder, entries in self._entries.items()}

    def copy(self) -> "Disk":
        """A copy, which changes apart."""
        return deepcopy(self)

    def apply(self, call: Call) -> None:
        """Make the change of a call."""
        match call.kind:
            case "stdout":
                self.stdout += call.data
            case "mkdir":
                self._entries.setdefault(call.path, {})
                self._synced.setdefault(call.path, {})
            case "create":
                if call.path not in self._folder(call.path):
                    self._change(call.path, [(call.path, _File())])
            case "write":
                file = self._folder(call.path)[call.path]
                file.data = (
                    file.data[: call.offset].ljust(call.offset, b"\0")
                    + call.data
                    + (file.data[call.offset + len(call.data) :])
                )
            case "truncate":
                file = self._folder(call.path)[call.path]
                file.data = file.data[: call.offset].ljust(call.offset, b"\0")
            case "sync" if call.path in self._entries:
                self._synced[call.path] = dict(self._entries[call.path])
                self._unsynced.pop(call.path, None)
            case "sync":
                file = self._folder(call.path)[call.path]
                file.synced = file.data
            case "rename":
                moved = self._folder(call.path)[call.path]
                self._change(call.path, [(call.path, None), (call.target, moved)])
            case "unlink":
                self._change(call.path, [(call.path, None)])
        self.derived = call.derived
        if self._old[-1] != call.derived:
            self._old.append(call.derived)

    def after_kill(self) -> Content:
        """What is there after a kill."""
        files = {path: file.data for entries in self._entries.values() for path, file in entries.items()}
        return files | self.derived

    def after_power_loss(
        self, folders: Callable[[int], int], file: Callable[[bytes, bytes], bytes]
    ) -> Content:
        """What is there after a loss of power.

        Args:
            folders: Of N unsynced changes of a folder, how many have reached the disk.
            file: Of what a file held when it was synced and what it holds now, what is on the disk.
        """
        found: Content = {}
        for folder, synced in self._synced.items():
            entries, changes = dict(synced), self._unsynced.get(folder, [])
            for change in changes[: folders(len(changes))]:
                _make(entries, change)
            found |= {path: file(one.synced, one.data) for path, one in entries.items()}
        return found

    def some_derived(self, rng: Random) -> Content:
        """The SQLite files as a loss of power may leave them: as they once were."""
        return rng.choice([*self._old, {}])

    def _folder(self, path: str) -> dict[str, _File]:
        return self._entries.setdefault(_folder_of(path), {})

    def _change(self, path: str, change: _Change) -> None:
        folder = _folder_of(path)
        _make(self._folder(path), change)
        self._synced.setdefault(folder, {})
        self._unsynced.setdefault(folder, []).append(change)


def _folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def _make(entries: dict[str, _File], change: _Change) -> None:
    for path, file in change:
        if file is None:
            entries.pop(path, None)
        else:
            entries[path] = file


def some_of(synced: bytes, data: bytes, rng: Random) -> bytes:
    """What a disk may hold of a file that was synced and then became `data`."""
    if synced == data:
        return data
    if not data.startswith(synced):  # it was cut, or written anew
        return rng.choice([synced, data])
    match rng.choice(["nothing", "all", "size", "start", "hole"]):
        case "nothing":
            return synced
        case "size":
            return synced.ljust(len(data), b"\0")
        case "start":
            return data[: rng.randint(len(synced), len(data))]
        case "hole":  # a page that was not written, between some that were
            begin = rng.randrange(len(synced), len(data)) // _BLOCK * _BLOCK
            begin, end = max(begin, len(synced)), min(begin + _BLOCK, len(data))
            return data[:begin] + bytes(end - begin) + data[end:]
        case _:
            return data
