"""OUT/checkpoints/: everything that a later run resumes from. A checkpoint exists whole or not at all.

    step-0000100/state/       weights and optimizer state, by torch.distributed.checkpoint (`sharded`)
                 stream.json  the position in the stream after the last step
                 info.json    steps, schedule, totals, and the size of every other file
    ../LATEST                 the name of the newest, written last

A folder is written under a name that ends in `.tmp`, all its files are synced, and it is renamed. What is
random in a step is drawn from the seed and the step's number, so that there is no generator state to keep.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import structlog
from safetensors import SafetensorError

from streamsyn.errors import SinkError
from streamsyn.io.durable import sync_folder, write_whole

log = structlog.get_logger()

FORMAT = 2
LATEST = "LATEST"
STATE = "state"
"""The folder of a checkpoint with weights and optimizer state."""
_NAME = re.compile(r"step-\d{7,}")
_TORN = ".tmp"
_OLD = f".old{_TORN}"
"""Suffix of a folder that is being replaced."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint with all its files.

    Attributes:
        folder: Where it is.
        info: What info.json holds.
        stream: What stream.json holds.
    """

    folder: Path
    info: dict[str, Any]
    stream: dict[str, Any] | None

    @property
    def step(self) -> int:
        """Optimizer steps made before it."""
        return int(self.info["step"])


class Checkpoints:
    """The checkpoints in OUT, of which the newest `keep` are kept."""

    def __init__(self, out: Path, keep: int) -> None:
        self._out = out
        self._root = out / "checkpoints"
        self._keep = keep

    def prepare(self) -> None:
        """Make the folder, and clean up after a kill: remove unfinished folders, restore replaced ones.

        Raises:
            SinkError: OUT cannot be written.
        """
        try:
            self._root.mkdir(exist_ok=True)
            for name in ("checkpoints/step-*", "model"):  # nothing else in OUT may be removed
                for old in self._out.glob(name + _OLD):
                    target = old.with_name(old.name.removesuffix(_OLD))
                    if not target.exists():
                        old.rename(target)
                for torn in self._out.glob(name + _TORN):
                    shutil.rmtree(torn)
        except OSError as error:
            raise SinkError(f"cannot write below {self._out}: {error.strerror}") from error

    def newest(self) -> Checkpoint | None:
        """The checkpoint that LATEST names; if it is missing or damaged, the newest whole one. None without
        any.

        Raises:
            SinkError: There are checkpoints, but none is whole: a new start would overwrite what is left.
        """
        try:
            named = [(self._out / LATEST).read_text("utf-8").strip()]
        except (OSError, UnicodeDecodeError):
            named = []
        names = list(dict.fromkeys([*named, *sorted(self._names(), reverse=True)]))
        for name in names:
            found = _read(self._root / name) if _NAME.fullmatch(name) else None
            if found is not None:
                if name != names[0]:
                    log.warning("checkpoint.damaged", name=names[0], goes_on_from=name)
                return found
        if names:
            raise SinkError(
                f"{self._root / names[0]} is damaged or missing, and no other checkpoint is whole; "
                "restore it from a copy, or use another --out"
            )
        return None

    def begin(self, step: int) -> None:
        """Make the folder that the files of a new checkpoint are written to: `unfinished(step)`.

        Other ranks make it at the same time, so nothing is removed from it: `prepare` and `discard` have
        removed what an earlier save left.

        Raises:
            SinkError: It cannot be made.
        """
        target = self.target(step)
        with _untouched(target):
            _temporary_path(target).mkdir(parents=True, exist_ok=True)

    def commit(self, info: dict[str, Any], stream: Any) -> Path:
        """Make the checkpoint of step `info["step"]` of what is in `unfinished(step)`, and remove the oldest
        ones.

        Args:
            info: What info.json is to hold.
            stream: The position in the stream.

        Returns:
            The folder.

        Raises:
            SinkError: It cannot be written; earlier checkpoints are unchanged.
        """
        target = self.target(info["step"])
        with _untouched(target):
            folder = _temporary_path(target)
            (folder / "stream.json").write_bytes(orjson.dumps(stream))
            sizes = {
                str(path.relative_to(folder)): path.stat().st_size
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            (folder / "info.json").write_bytes(orjson.dumps({"format": FORMAT, **info, "files": sizes}))
            _put_in_place(target)
        write_whole(self._out / LATEST, f"{target.name}\n".encode())
        # Later ones belong to an abandoned course: this training resumed from a checkpoint before them.
        kept = sorted(name for name in self._names() if name <= target.name)[-self._keep :]
        for name in {*self._names()} - {*kept}:
            try:
                remove(self._root / name)
            except OSError as error:  # harmless: the next start tries again
                log.warning("checkpoint.not_removed", name=name, why=error.strerror)
        return target

    def discard(self, step: int) -> None:
        """Remove what there is of an unfinished checkpoint, as far as possible."""
        shutil.rmtree(self.unfinished(step), ignore_errors=True)

    def unfinished(self, step: int) -> Path:
        """Where the files of the checkpoint of a step are written, before it is committed."""
        return _temporary_path(self.target(step))

    def target(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self._root / f"step-{step:07d}"

    def _names(self) -> list[str]:
        return [path.name for path in self._root.glob("step-*") if _NAME.fullmatch(path.name)]


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder whole or not at all, replacing an existing one.

    Args:
        target: Its path.
        fill: Writes the files into the folder it is given.

    Raises:
        SinkError: It cannot be written; the folder that was there is unchanged.
    """
    with _untouched(target):
        _make_empty(_temporary_path(target))
        fill(_temporary_path(target))
        _put_in_place(target)


@contextmanager
def _untouched(target: Path) -> Iterator[None]:
    """Raise an error while `target` is written as a SinkError; nothing unfinished is left, nor changed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(_temporary_path(target), ignore_errors=True)
        why = getattr(error, "strerror", None) or str(error)
        raise SinkError(f"cannot write {target}: {why}; what was saved before it is whole") from error


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _put_in_place(target: Path) -> None:
    """Sync what was written for `target`, and rename it; what was there is replaced."""
    temporary = _temporary_path(target)
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    old = target.with_name(target.name + _OLD)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    temporary.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _temporary_path(target: Path) -> Path:
    return target.with_name(target.name + _TORN)


def remove(folder: Path) -> None:
    """Remove a folder. A kill in between leaves nothing that looks whole."""
    torn = _temporary_path(folder)
    folder.rename(torn)
    shutil.rmtree(torn)


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _read(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`; None if it is not whole.

    Raises:
        SinkError: A different version of streamsyn wrote it.
    """
    try:
        info = orjson.loads((folder / "info.json").read_bytes())
        stream = orjson.loads((folder / "stream.json").read_bytes())
        written_as = info["format"]
        whole = all((folder / name).stat().st_size == size for name, size in info["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if whole and written_as != FORMAT:
        anew = f", or begin a new one with --model {folder / 'model'} and a different --out"
        anew = anew if (folder / "model" / "config.json").exists() else ""
        raise SinkError(
            f"{folder} has the format of streamsyn {info.get('streamsyn')}, which this version does not "
            f"read: finish this training with that version{anew}"
        )
    return Checkpoint(folder, info, stream) if whole else None
