"""The fencing epoch of a mirror: of several runs that copy to one, only what the newest lists counts.

Run directories on different disks have locks and epochs of their own; what they share is the mirror. So each
opening of a mirror claims `epochs/0000000N` there, which one run alone can create. N is never given again.

A run that finds N+1 has been taken over, and stops. It looks before each write, but a look and a write are
two steps. So what an older run writes late must not count, wherever it was paused:

    epochs/0000000N.manifest.jsonl    the lists of epoch N, which no other epoch writes; readers take the
    epochs/0000000N.run.json          newest that there is
    contexts/part-NNNNNN.jsonl        created where it does not exist, never replaced by a different content
    contexts/part-NNNNNN.eNNNNNNNN.jsonl    where the name is taken: the shard of epoch NNNNNNNN

The lists are written, and then the epoch is checked. If it is still the newest, every later epoch reads them.
The mirror's own `manifest.jsonl` and `run.json` are copies of these lists, for people and older versions.
"""

import os
import platform
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import orjson
import structlog

from streamsyn.errors import DirectoryInUse, TakenOver
from streamsyn.sink.epoch import FOLDER, boot_id, writer
from streamsyn.sink.mirror_target import CopyMismatch, MirrorTarget, NoConditionalPut
from streamsyn.sink.rundir import holder_of

log = structlog.get_logger()

MANIFEST: Final = "manifest.jsonl"
RUN: Final = "run.json"
OUTCOMES: Final = ("contexts", "rejects")
_LISTS = re.compile(rf"{FOLDER}/(\d{{8}})\.({re.escape(MANIFEST)}|{re.escape(RUN)})")
_OWN_NAME = re.compile(rb'("path":"[a-z]+/part-\d{6})\.e\d{8}(?=\.jsonl)')


class MirrorEpoch:
    """One opening of a mirror for writing. For one thread.

    Args:
        target: The mirror.
        number: Of the epoch.
        is_fenced: Whether the store decides who has an epoch, and who creates a file.
    """

    def __init__(self, target: MirrorTarget, number: int, *, is_fenced: bool) -> None:
        self.number = number
        self._target = target
        self._is_fenced = is_fenced
        self._created: set[str] = set()
        """Shards that this epoch has created under their own names, right or not."""
        self._lists: dict[str, bytes] = {}
        """What this epoch lists."""
        self.steps = 0
        """Number of files that were written: some progress, even if others fail."""

    def check(self) -> None:
        """Make sure that this epoch is still the newest.

        Raises:
            TakenOver: It is not.
        """
        newer = self._target.read(_token(self.number + 1))
        if newer is not None:
            raise TakenOver(
                f"the mirror {self._target.url} was taken over by {_named(_owner(newer))} "
                f"(epoch {self.number + 1}): this process has stopped, and writes nothing more to it"
            )

    def put_list(self, name: str, data: bytes) -> None:
        """Write MANIFEST or RUN. When this returns, every later epoch begins with it.

        Raises:
            TakenOver: A newer run has the mirror.
            CopyMismatch: What was read back differs.
        """
        if self._lists.get(name) != data:
            self._target.put(f"{_token(self.number)}.{name}", data)
            self._lists[name] = data
            self.steps += 1
        self.check()
        self._target.put(name, data)
        self.steps += 1

    def copy(self, path: Path, line: dict[str, Any], listed: str | None) -> str:
        """Copy a shard, and read it back; returns its name in the mirror.

        Args:
            path: The shard.
            line: Its entry in the manifest of the run.
            listed: Its name in the mirror's manifest, if that has it: to write the same bytes again is
                right, however late.

        Raises:
            TakenOver: A newer run has the mirror.
            CopyMismatch: What was read back differs.
        """
        self.check()
        name = listed or line["path"]
        if listed or name in self._created or not self._is_fenced:
            self._target.copy(path, name)
        else:
            try:
                self._target.create(name, path)
                self._created.add(name)
            except FileExistsError:  # left by an older run, or by a call of this one that seemed to fail
                if not self._target.holds(name, line["bytes"], line["sha256"]):
                    name = name.replace(".jsonl", f".e{self.number:08d}.jsonl")
                    self._target.copy(path, name)
        if not self._target.holds(name, line["bytes"], line["sha256"]):
            raise CopyMismatch(f"{name} was not read back as it was written")
        self.steps += 1
        return name


@dataclass(frozen=True, slots=True)
class MirrorLists:
    """What a mirror lists.

    Attributes:
        run: The content of run.json; None if there is none.
        manifest: The whole lines of the manifest.
    """

    run: bytes | None
    manifest: list[bytes]

    def lacking(self, ours: Iterable[bytes]) -> list[dict[str, Any]]:
        """The lines, decoded, that are not among `ours`."""
        known = set(map(plain, ours))
        return [orjson.loads(raw) for raw in self.manifest if plain(raw) not in known]


def read_lists(target: MirrorTarget) -> MirrorLists:
    """What the newest epoch that has written lists has written."""
    newest = {RUN: RUN, MANIFEST: MANIFEST}
    for name in sorted(target.sizes(FOLDER)):
        if match := _LISTS.fullmatch(name):
            newest[match[2]] = name
    data = target.read(newest[MANIFEST]) or b""
    lines = [raw for raw in data.splitlines(keepends=True) if raw.endswith(b"\n")]
    return MirrorLists(target.read(newest[RUN]), lines)


def plain(raw: bytes) -> bytes:
    """A line of a manifest, with the name that its shard has in a run directory."""
    return _OWN_NAME.sub(rb"\1", raw)


def created_at(run_json: bytes) -> Any:
    """The time that identifies a run; None when this is not the content of a run.json."""
    try:
        return orjson.loads(run_json)["created_at"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None


def claim_mirror(target: MirrorTarget, root: Path, *, takes_over: bool) -> MirrorEpoch:
    """Claim the next epoch of a mirror; from then on all older runs are refused.

    Args:
        target: The mirror.
        root: The run directory that is copied to it.
        takes_over: Whether to take it from a run of this machine that is alive.

    Raises:
        DirectoryInUse: Such a run has it, with a different run directory.
    """
    numbers = [int(Path(name).name) for name in target.sizes(FOLDER) if Path(name).name.isdigit()]
    number = max(numbers, default=0)
    if number and not takes_over:
        _refuse_in_use(target, _owner(target.read(_token(number)) or b""), root)
    owner = {
        "pid": os.getpid(),
        "host": platform.node(),
        "boot": boot_id(),
        "out": str(root.absolute()),
        "at": time.time(),
        "claim": uuid4().hex,  # tells an answer that was lost from the claim of a different run
    }
    token = orjson.dumps(owner, option=orjson.OPT_APPEND_NEWLINE)
    is_fenced = True
    while True:
        number += 1
        try:
            _create_token(target, _token(number), token)
        except NoConditionalPut as error:
            is_fenced = False
            target.put(_token(number), token)
            log.warning(
                "mirror.not_fenced",
                url=target.url,
                why=str(error),
                then="an older run stops when it finds this one, but what it writes meanwhile may count: "
                "make sure that one run at a time has this mirror, or use a store with conditional puts",
            )
        except FileExistsError:
            continue
        return MirrorEpoch(target, number, is_fenced=is_fenced)


def _create_token(target: MirrorTarget, name: str, token: bytes) -> None:
    """Create the file of an epoch, and make sure that the store refuses to create it again.

    Raises:
        FileExistsError: A different run has this epoch.
        NoConditionalPut: The store takes the condition, and ignores it.
    """
    try:
        target.create(name, token)
    except FileExistsError:
        if target.read(name) != token:
            raise
    with suppress(FileExistsError):
        target.create(name, token)
        raise NoConditionalPut(f"{target.url} has replaced a file on condition that it did not exist")


def _refuse_in_use(target: MirrorTarget, owner: dict[str, Any], root: Path) -> None:
    """Refuse a mirror whose newest epoch a run of this machine has that is alive.

    Raises:
        DirectoryInUse: It is.
    """
    out = Path(owner.get("out") or root.absolute())
    is_here = owner.get("boot") == boot_id() != ""
    if is_here and out != root.absolute() and writer(out, holder_of(out)) is not None:
        raise DirectoryInUse(
            f"sink.mirror: {target.url} is in use by {_named(owner)}, which writes to {out}: stop that run, "
            "choose a different URL, or take its place with --take-over"
        )


def _token(number: int) -> str:
    return f"{FOLDER}/{number:08d}"


def _owner(token: bytes) -> dict[str, Any]:
    """Who claimed an epoch; nothing of a file that was just created."""
    try:
        return dict(orjson.loads(token))
    except (orjson.JSONDecodeError, TypeError, ValueError):
        return {}


def _named(owner: dict[str, Any]) -> str:
    return f"pid {owner['pid']} on {owner['host']}" if {"pid", "host"} <= owner.keys() else "another process"
