"""A checkpoint is there whole or not at all, whenever the process is killed."""

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from streamsyn.errors import SinkError
from streamsyn.trainer.saving.checkpoint import Checkpoints
from tests.builders import disk_full_beyond

WRITER = """
import os, sys
from pathlib import Path
from streamsyn.trainer.saving.checkpoint import Checkpoints

def fill(folder):
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_bytes(bytes([3]) * 1000)
    (folder / "moments").write_bytes(bytes([3]) * 2000)

def killed_at(calls):
    def audit(event, _arguments, seen=[0]):
        # whatever changes a file or a folder: the process is gone before it happens
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            seen[0] += 1
            if seen[0] == calls:
                os._exit(9)
    sys.addaudithook(audit)

for line in sys.stdin:
    out, calls = line.split()
    child = os.fork()
    if child == 0:
        checkpoints = Checkpoints(Path(out), keep=2)
        killed_at(int(calls))
        checkpoints.prepare()
        checkpoints.begin(3)
        fill(checkpoints.unfinished(3))
        checkpoints.commit({"step": 3}, {"position": 3})
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Writes a third checkpoint in a fork for each line, which is gone at the n-th change of a file."""


def write(out: Path, step: int) -> Path:
    """The checkpoint of a step; every byte of it depends on the step."""

    checkpoints = Checkpoints(out, keep=2)
    checkpoints.begin(step)
    folder = checkpoints.unfinished(step)
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_bytes(bytes([step]) * 1000)
    (folder / "moments").write_bytes(bytes([step]) * 2000)
    return checkpoints.commit({"step": step}, {"position": step})


def assert_whole(out: Path, step: int) -> None:
    """A later run would resume from the checkpoint of `step`, which has all its parts."""
    found = Checkpoints(out, keep=2).newest()

    assert found is not None
    assert (step, {"position": step}) == (found.step, found.stream)
    assert bytes([step]) * 1000 == (found.folder / "model" / "weights").read_bytes()
    assert bytes([step]) * 2000 == (found.folder / "moments").read_bytes()


def prepared(out: Path) -> Path:
    out.mkdir(exist_ok=True)
    Checkpoints(out, keep=2).prepare()
    return out


@pytest.mark.crash
def test_a_kill_at_any_file_leaves_a_whole_one(tmp_path: Path) -> None:
    """Killed before each change of a file in turn, while a third checkpoint replaces the first: the newest is
    the second or the third, whole. Then nothing torn is left, and one more can be written.
    """
    killed, newest = 0, set()
    with subprocess.Popen(
        [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        for calls in range(1, 200):
            out = prepared(tmp_path / str(calls))
            for step in (1, 2):
                write(out, step)
            writer.stdin.write(f"{out} {calls}\n")
            code = int(writer.stdout.readline())
            found = Checkpoints(out, keep=2).newest()
            assert found is not None
            newest.add(found.step)
            assert_whole(out, found.step)
            prepared(out)
            assert [] == list(out.glob("**/*.tmp"))
            assert_whole(out, found.step)
            write(out, 4)
            assert_whole(out, 4)
            if code == 0:
                break
            assert 9 == code
            killed += 1

    assert killed > 10
    assert {2, 3} == newest


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """Older ones are removed once a newer one is whole."""
    out = prepared(tmp_path)
    for step in range(1, 5):
        write(out, step)

    assert ["step-0000003", "step-0000004"] == sorted(path.name for path in (out / "checkpoints").iterdir())
    assert "step-0000004\n" == (out / "LATEST").read_text()


def test_later_steps_of_an_abandoned_course_are_removed(tmp_path: Path) -> None:
    """They are removed, not the checkpoint that was just written."""
    out = prepared(tmp_path)
    for step in (3, 4, 1):
        write(out, step)

    assert_whole(out, 1)
    assert ["step-0000001"] == [path.name for path in (out / "checkpoints").iterdir()]


class Killed(BaseException):
    """Raised in place of a kill."""


def kill_at(change: int, patch: pytest.MonkeyPatch) -> None:
    """Kill before the change of this number."""
    left = iter(range(change - 1, -1, -1))

    def counted(call: Any, *given: Any, **more: Any) -> Any:
        if next(left, -1) == 0:
            raise Killed
        return call(*given, **more)

    for name in ("rename", "unlink", "rmdir"):
        patch.setattr(os, name, partial(counted, getattr(os, name)))


def test_a_kill_while_the_only_one_is_rewritten_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at the end of a stream, at a step that was saved before: a later run finds one of the two, whole."""
    killed = 0
    for change in range(1, 20):
        out = prepared(tmp_path / str(change))
        write(out, 3)
        with monkeypatch.context() as patch, suppress(Killed):
            kill_at(change, patch)
            killed = change
            write(out, 3)
            break
        assert_whole(prepared(out), 3)
        assert [] == list(out.glob("**/*.tmp"))

    assert killed > 5


@pytest.mark.parametrize("damage", ["gone", "shorter", "no info", "no name", "name of nothing"])
def test_a_damaged_one_is_skipped(tmp_path: Path, damage: str) -> None:
    """If the checkpoint in LATEST lacks a file or a byte, or LATEST is lost, the newest whole one is used."""
    out = prepared(tmp_path)
    for step in (1, 2):
        folder = write(out, step)
    match damage:
        case "gone":
            (folder / "moments").unlink()
        case "shorter":
            os.truncate(folder / "model" / "weights", 999)
        case "no info":
            (folder / "info.json").write_text("{")
        case "no name":
            (out / "LATEST").unlink()
        case "name of nothing":
            (out / "LATEST").write_text("../../etc")

    assert_whole(out, 2 if "name" in damage else 1)


def test_damaged_checkpoints_alone_are_refused(tmp_path: Path) -> None:
    """A new start would overwrite what is left."""
    out = prepared(tmp_path)
    (write(out, 1) / "moments").unlink()

    with pytest.raises(SinkError, match=r"step-0000001 is damaged or missing"):
        Checkpoints(out, 3).newest()


def test_what_cannot_be_removed_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new checkpoint is written all the same."""
    out = prepared(tmp_path)
    write(out, 1)

    def fails(path: Path, *, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", fails)
    with capture_logs() as logs:
        for step in (2, 3, 4):
            write(out, step)

    assert_whole(out, 4)
    assert ["step-0000001", "step-0000002"] == [
        line["name"] for line in logs if line["event"] == "checkpoint.not_removed"
    ]


def test_other_files_in_out_stay(tmp_path: Path) -> None:
    """A user's own files and folders in OUT, whatever their names."""
    (tmp_path / "mine.tmp").mkdir()
    (tmp_path / "notes.tmp").write_text("")
    prepared(tmp_path)

    assert {"checkpoints", "mine.tmp", "notes.tmp"} == {path.name for path in tmp_path.iterdir()}


def test_a_full_disk_is_one_line_and_costs_nothing(tmp_path: Path) -> None:
    """Earlier checkpoints stay; nothing unfinished is left. While a rank writes its part: `test_sharded`."""
    out = prepared(tmp_path)
    write(out, 1)
    checkpoints = Checkpoints(out, keep=2)
    checkpoints.begin(2)
    with (
        disk_full_beyond(15),
        pytest.raises(SinkError, match=r"step-0000002.*too large.*before it is whole"),
    ):
        checkpoints.commit({"step": 2}, {"position": 2})

    assert_whole(out, 1)
    assert [] == list(out.glob("**/*.tmp"))


@pytest.mark.parametrize("kind", ["whole", "adapters"])
def test_one_of_an_earlier_version_is_refused(tmp_path: Path, kind: str) -> None:
    """In one line, with what to do: a whole model in it can be the start of a new training."""
    out = prepared(tmp_path)
    folder = write(out, 1)
    info = json.loads((folder / "info.json").read_bytes())
    (folder / "info.json").write_text(json.dumps(info | {"format": 1, "streamsyn": "0.9"}))
    if kind == "whole":
        (folder / "model" / "config.json").write_text("{}")

    with pytest.raises(SinkError) as raised:
        Checkpoints(out, 3).newest()
    told = (
        f"{folder} has the format of streamsyn 0.9, which this version does not read: finish this training "
    )
    told += "with that version"
    if kind == "whole":
        told += f", or begin a new one with --model {folder}/model and a different --out"
    assert told == str(raised.value)


def test_there_is_nothing_at_first(tmp_path: Path) -> None:
    """Without a checkpoint there is no error."""
    assert Checkpoints(prepared(tmp_path), keep=2).newest() is None
