"""The fencing epoch: of two processes that write to a run directory, only what the newer one writes counts.

A process that is paused between its check and its write is the hard case. Here it is a call of the operating
system before which everything else happens: the other process opens the directory, writes, perhaps ends.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.errors import DirectoryInUse, SinkError, TakenOver
from streamsyn.pipeline.verify import Verification
from streamsyn.sink import epoch
from streamsyn.sink.completed_keys import row_key
from streamsyn.sink.log import RunLog
from streamsyn.sink.manifest import Manifest
from streamsyn.sink.rundir import RunDirectory
from tests.builders import COMPRESSIONS, context, outcome, rows, sample, sink
from tests.examples import examples

OUTCOMES = 24
CALLS = ("open", "write", "fsync", "ftruncate", "rename", "replace", "unlink", "mkdir")


class Coordinator:
    """A process that writes all outcomes which the log lacks.

    Attributes:
        acknowledged: The outcomes that it has passed on, for they were safe.
    """

    def __init__(self, root: Path, *, shard_bytes: int = 2000, compression: str = "none") -> None:
        self.acknowledged: list[int] = []
        self._root = root
        self._section = sink(shard_bytes=shard_bytes, compression=compression)
        self._steps = self._write()

    def run(self, steps: int | None = None) -> None:
        """Go on for some steps, or to the end; a process that was taken over has ended."""
        with suppress(TakenOver, SinkError):  # a call on a file that is gone may fail before the check
            for _ in islice(self._steps, steps):
                pass

    def end(self) -> None:
        """Close what is open; the garbage collector would do so in the middle of another test."""
        with suppress(TakenOver, SinkError):
            self._steps.close()

    def _write(self) -> Generator[None, None, None]:
        directory = RunDirectory(self._root, take_over=True)
        try:
            log = RunLog(self._root, self._section, epoch=directory.epoch)
            try:
                yield from self._write_to(log)
            finally:
                with suppress(TakenOver):
                    log.close(quietly=True)
        finally:
            directory.close()

    def _write_to(self, log: RunLog) -> Iterator[None]:
        claims = log.claims()
        numbered = {outcome(number).key: number for number in range(OUTCOMES)}
        finished = claims.finished(list(numbered))
        claims.close()
        missing = [number for key, number in numbered.items() if key not in finished]
        yield
        for at in range(0, len(missing), 2):
            some = missing[at : at + 2]
            log.append([outcome(number) for number in some])
            yield
            log.sync()
            self.acknowledged += some
            yield
        log.seal_outcomes()
        log.finish()
        yield


@contextmanager
def paused_before(number: int, meanwhile: Callable[[], None]) -> Iterator[None]:
    """Within the block, `meanwhile` is called before the call of this number that changes files."""
    real = {name: getattr(os, name) for name in CALLS}
    calls, is_other = 0, False

    def calling(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls, is_other
            changes = name != "open" or args[1] & os.O_CREAT
            if changes and not is_other:
                if calls == number:
                    is_other = True
                    meanwhile()
                    is_other = False
                calls += 1
            return real[name](*args, **options)

        return call

    patched: dict[str, Any] = {name: calling(name) for name in CALLS}
    with mock.patch.multiple(os, **patched):
        yield


def check(root: Path, *coordinators: Coordinator) -> None:
    """Each outcome is there once, nothing that was acknowledged is lost, and `verify` finds nothing."""
    numbered = {outcome(number).key: number for number in range(OUTCOMES)}
    found = [numbered[row_key(row)] for kind in ("contexts", "rejects") for row in rows(root, kind)]
    assert list(range(OUTCOMES)) == sorted(found)
    for coordinator in coordinators:
        assert set(found).issuperset(coordinator.acknowledged)
    assert [] == list(Verification(root).problems(None))
    numbers = [shard.path for shard in Manifest(root / "manifest.jsonl").shards]
    assert len(numbers) == len(set(numbers))


@examples(60)
@given(
    number=st.integers(0, 160),
    before=st.integers(0, 20),
    meanwhile=st.integers(0, 40),
    compression=st.sampled_from(COMPRESSIONS),
)
def test_a_late_call_changes_nothing(number: int, before: int, meanwhile: int, compression: str) -> None:
    """One call of a process comes after another one has taken over, and written some or all of the rest."""
    with tempfile.TemporaryDirectory() as folder:
        late_call(Path(folder), number, before, meanwhile, compression)


def late_call(root: Path, number: int, before: int, meanwhile: int, compression: str) -> None:
    """Play it.

    Args:
        root: The run directory.
        number: Which call of the first process comes late.
        before: Steps of a process before both.
        meanwhile: Steps of the second process before that call; it takes the others later.
        compression: Of shards.
    """
    earlier, first, second, last = (
        Coordinator(root, shard_bytes=1500 if compression == "none" else 500, compression=compression)
        for _ in range(4)
    )
    earlier.run(before)
    with paused_before(number, lambda: second.run(meanwhile)):
        first.run()
    second.run()
    last.run()
    check(root, earlier, first, second, last)
    for one in (earlier, first, second, last):
        one.end()


def test_a_file_that_lost_its_name_gets_it_back(tmp_path: Path) -> None:
    """What an older process deletes or moves away, too late, is there again after the next sync."""
    directory = RunDirectory(tmp_path)
    log = RunLog(tmp_path, sink(), epoch=directory.epoch)
    log.append([context(0)])
    shard = tmp_path / "contexts" / "part-000000.jsonl.open"
    shard.unlink()
    (tmp_path / "manifest.jsonl").unlink()
    log.sync()
    log.append([context(1)])
    log.seal_outcomes()

    assert [0, 1] == [row["seq"] for row in rows(tmp_path, "contexts")]
    assert [{"contexts": 2}] == [
        {"contexts": count} for count in Manifest(tmp_path / "manifest.jsonl").flushes
    ]
    log.close()
    directory.close()


def test_the_older_process_is_told_who_took_over(tmp_path: Path) -> None:
    """One line, from whatever it does next; its samples are not delivered either."""
    first = RunDirectory(tmp_path)
    log = RunLog(tmp_path, sink(), epoch=first.epoch)
    log.append([context(0)])
    with pytest.raises(DirectoryInUse):
        RunDirectory(tmp_path)
    second = RunDirectory(tmp_path, take_over=True)

    line = f"{tmp_path} was taken over by pid {os.getpid()} on .* \\(epoch 2\\): this process has stopped"
    for act in (log.sync, log.seal_outcomes, lambda: log.append([context(1)]), log.epoch.check):
        with pytest.raises(TakenOver, match=line):
            act()
    with pytest.raises(TakenOver):
        log.samples.append([sample(0)])
    with pytest.raises(TakenOver):
        log.close()
    first.close()
    second.close()
    assert [0] == [row["seq"] for row in rows(tmp_path, "contexts")]


@pytest.mark.parametrize(
    ("end", "goes_on"), [("closed", True), ("killed", True), ("killed elsewhere", False), ("alive", False)]
)
def test_files_are_kept_from_processes_that_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, goes_on: bool
) -> None:
    """Only who may still be alive is left with the old files; that costs a new index."""
    boot = tmp_path / "boot"
    monkeypatch.setattr(epoch, "_BOOT_ID", boot)
    boot.write_text("elsewhere" if end == "killed elsewhere" else "here")
    root = tmp_path / "out"
    first = RunDirectory(root)
    log = RunLog(root, sink(), epoch=first.epoch)
    log.append([context(0)])
    log.close()
    shard = root / "contexts" / "part-000000.jsonl.open"
    before = shard.stat().st_ino
    boot.write_text("here")
    if end == "closed":
        first.close()
    elif end.startswith("killed"):
        first._unlock()  # the kernel does that
    second = RunDirectory(root, take_over=end == "alive")

    assert goes_on == (shard.stat().st_ino == before)
    folder = "index" if goes_on else "index-00000002"
    assert root / folder / "finished.sqlite" == second.epoch.database("finished.sqlite")
    again = RunLog(root, sink(), epoch=second.epoch)
    assert 1 == again.contexts.rows
    again.close()
    second.close()
    if end == "alive":
        first.close()
    third = RunDirectory(root)
    assert root / folder / "finished.sqlite" == third.epoch.database("finished.sqlite")
    third.close()


def test_the_manifest_names_epochs(tmp_path: Path) -> None:
    """Each line has that of its process; a line of an older one behind one of a newer one does not count."""
    path = tmp_path / "manifest.jsonl"
    for _ in range(2):
        directory = RunDirectory(tmp_path)
        log = RunLog(tmp_path, sink(), epoch=directory.epoch)
        log.append([context(log.contexts.rows)])
        log.seal_outcomes()
        log.close()
        directory.close()
    assert [b"1", b"1", b"2", b"2"] == re.findall(rb'"epoch":(\d+)}\n', path.read_bytes())
    with path.open("ab") as file:
        file.write(b'{"flush":true,"contexts":9,"epoch":1}\n')

    assert [1, 2] == Manifest(path).flushes


def test_a_directory_of_an_older_version_opens(tmp_path: Path) -> None:
    """It has no epochs: its files are used as they are."""
    (tmp_path / "contexts").mkdir()
    (tmp_path / "manifest.jsonl").write_bytes(b'{"flush":true,"contexts":0}\n')
    directory = RunDirectory(tmp_path)

    assert 1 == directory.epoch.number
    assert [0] == RunLog(tmp_path, sink(), epoch=directory.epoch).manifest.flushes
    directory.close()


@pytest.mark.parametrize("lost", ["all", "newest"])
def test_lines_count_although_the_epochs_were_lost(tmp_path: Path, lost: str) -> None:
    """As in a copy of a mirror, which has none, or of a backup: the next one is above all in the manifest."""
    for _ in range(3):
        directory = RunDirectory(tmp_path)
        with closing(RunLog(tmp_path, sink(), epoch=directory.epoch)) as log:
            log.append([context(log.contexts.rows)])
            log.seal_outcomes()
        directory.close()
        if lost == "newest":
            (tmp_path / "epochs" / f"{directory.epoch.number:08d}").rename(tmp_path / "epochs" / "00000001")
        else:
            shutil.rmtree(tmp_path / "epochs")

    assert [1, 2, 3] == Manifest(tmp_path / "manifest.jsonl").flushes


@pytest.mark.parametrize("content", ["", "[]", "5", '{"x":1}', '{"closed":tr', '{"closed":true}'])
def test_other_files_among_the_epochs_are_harmless(tmp_path: Path, content: str) -> None:
    """Names that are not epochs are left alone; a damaged epoch is one whose process may be alive."""
    RunDirectory(tmp_path).close()
    for name in ("notes.txt", "7", "٣", "123456789"):
        (tmp_path / "epochs" / name).touch()
    (tmp_path / "epochs" / "00000007").write_text(content)
    first = RunDirectory(tmp_path)
    second = RunDirectory(tmp_path, take_over=True)
    (tmp_path / "epochs" / "00000009").write_text(content)

    with pytest.raises(TakenOver, match=r"another process \(epoch 9\)"):
        first.epoch.check()
    second.close()
    first.close()
    (tmp_path / "epochs" / "99999999").touch()
    with pytest.raises(SinkError, match="last epoch, 99999999"):
        RunDirectory(tmp_path)


@pytest.mark.parametrize("number", range(12))
def test_the_owners_of_ids_outlive_a_takeover_that_is_killed(tmp_path: Path, number: int) -> None:
    """They cannot be made from the log. Whichever call is the last one, the next process has them."""

    def kill() -> None:
        raise KeyboardInterrupt

    first = RunDirectory(tmp_path)
    first.epoch.database("ids.sqlite").write_text("owners")
    with suppress(KeyboardInterrupt), paused_before(number, kill):
        RunDirectory(tmp_path, take_over=True)
    last = RunDirectory(tmp_path, take_over=True)

    assert "owners" == last.epoch.database("ids.sqlite").read_text()
    last.close()
    first.close()
    assert [] == list(tmp_path.glob(".index-*"))


def test_an_exclusive_create_that_was_sent_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NFS server whose answer was lost: the repeated request finds the file. The next epoch is claimed."""
    RunDirectory(tmp_path).close()
    real, lost = os.open, iter([True])

    def twice(path: Any, flags: int, *more: int) -> int:
        file = real(path, flags, *more)
        if flags & os.O_EXCL and next(lost, False):
            os.close(file)
            raise FileExistsError(path)
        return file

    monkeypatch.setattr(os, "open", twice)
    directory = RunDirectory(tmp_path)
    assert 3 == directory.epoch.number
    assert ["00000003"] == [path.name for path in (tmp_path / "epochs").iterdir()]
    directory.epoch.check()
    directory.close()
