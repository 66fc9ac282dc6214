"""OUT/checkpoints/: all that a later run goes on from, in one folder that is there whole or not at all.

    step-0000100/model/                 as `save_pretrained` writes it, float32
                 optimizer.safetensors  AdamW's two moments by the names of the weights
                 stream.json            the position in the stream, after the last plan trained on
                 info.json              steps, schedule, totals, and the size of each other file
    ../LATEST                           the name of the newest, written last

A folder is written under a name that ends in `.tmp`, every file of it synced, and renamed. What is random
in a step is drawn from the seed and the step's number, so there is no state of a generator to keep.

What of a training goes to disk, and comes back: checkpoints, and the tuned model in OUT/model.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import structlog
from safetensors import SafetensorError

from streamsyn.errors import SinkError
from streamsyn.io.durable import sync_folder, write_whole

log = structlog.get_logger()

FORMAT = 1
LATEST = "LATEST"
_NAME = re.compile(r"step-\d{7,}")
_TORN = ".tmp"
_OLD = f".old{_TORN}"
"""Ends the name of what another folder is taking the place of."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that is whole."""

    folder: Path
    info: dict[str, Any]
    stream: dict[str, Any] | None

    @property
    def step(self) -> int:
        """Optimizer steps behind it."""
        return int(self.info["step"])


class Checkpoints:
    """The checkpoints below OUT, of which the newest `keep` stay."""

    def __init__(self, out: Path, keep: int) -> None:
        self._out = out
        self._root = out / "checkpoints"
        self._keep = keep

    def prepare(self) -> None:
        """Make the folder; remove what a kill left half-written, put back what it left without a successor.

        Raises:
            SinkError: It cannot be done.
        """
        try:
            self._root.mkdir(exist_ok=True)
            for name in ("checkpoints/step-*", "model"):  # nothing else here is ours to remove
                for old in self._out.glob(name + _OLD):
                    target = old.with_name(old.name.removesuffix(_OLD))
                    if not target.exists():
                        old.rename(target)
                for torn in self._out.glob(name + _TORN):
                    shutil.rmtree(torn)
        except OSError as error:
            raise SinkError(f"cannot write below {self._out}: {error.strerror}") from error

    def newest(self) -> Checkpoint | None:
        """What LATEST names; if that is gone or damaged, the newest that is whole.

        Raises:
            SinkError: There are some, and none is whole: to begin anew would throw away what is left of them.
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
                f"{self._root / names[0]} is damaged or gone, and no other checkpoint is whole; "
                f"restore it from a copy, or give the training another --out"
            )
        return None

    def write(self, info: dict[str, Any], stream: Any, fill: Callable[[Path], None]) -> Path:
        """Write the checkpoint of `info["step"]`; `fill` puts the large files into the folder it is given.

        Raises:
            SinkError: It cannot be written; what was there before is as it was.
        """
        target = self._target(info["step"])

        def all_of_it(folder: Path) -> None:
            fill(folder)
            (folder / "stream.json").write_bytes(orjson.dumps(stream))
            sizes = {
                str(path.relative_to(folder)): path.stat().st_size
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            (folder / "info.json").write_bytes(orjson.dumps({"format": FORMAT, **info, "files": sizes}))

        write_folder(target, all_of_it)
        write_whole(self._out / LATEST, f"{target.name}\n".encode())
        # Later ones are of a course that was given up: this training went on from before them.
        kept = sorted(name for name in self._names() if name <= target.name)[-self._keep :]
        for name in {*self._names()} - {*kept}:
            try:
                remove(self._root / name)
            except OSError as error:  # it has been replaced all the same; the next start tries again
                log.warning("checkpoint.not_removed", name=name, why=error.strerror)
        return target

    def _target(self, step: int) -> Path:
        return self._root / f"step-{step:07d}"

    def _names(self) -> list[str]:
        return [path.name for path in self._root.glob("step-*") if _NAME.fullmatch(path.name)]


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder of what `fill` puts into it, whole or not at all; one of that name is replaced.

    Raises:
        SinkError: It cannot be written; the line names what stays.
    """
    aside = _aside(target)
    try:
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
        fill(aside)
        for path in [*aside.rglob("*"), aside]:
            _sync(path)
        old = target.with_name(target.name + _OLD)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        aside.rename(target)
        sync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        why = getattr(error, "strerror", None) or str(error)
        raise SinkError(f"cannot write {target}: {why}; what was saved before it is whole") from error


def _aside(target: Path) -> Path:
    return target.with_name(target.name + _TORN)


def remove(folder: Path) -> None:
    """Remove a folder; a kill in between leaves nothing that looks whole."""
    torn = _aside(folder)
    folder.rename(torn)
    shutil.rmtree(torn)


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _read(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`, if all its files are there."""
    try:
        info = orjson.loads((folder / "info.json").read_bytes())
        stream = orjson.loads((folder / "stream.json").read_bytes())
        whole = info["format"] == FORMAT and all(
            (folder / name).stat().st_size == size for name, size in info["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Checkpoint(folder, info, stream) if whole else None
