"""The fencing epoch of a mirror: of runs with one mirror, only what the newest one lists counts.

As in `test_epoch`, a run that is paused between its check and its write is played by a call, here of the
mirror's file system, before which everything else happens: a different run takes the mirror over.
"""

import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from streamsyn.config.fingerprint import fingerprint
from streamsyn.config.loading import Config
from streamsyn.errors import ConfigError, DirectoryInUse, TakenOver
from streamsyn.pipeline.verify import Verification
from streamsyn.sink import epoch, mirror
from streamsyn.sink.completed_keys import row_key
from streamsyn.sink.log import RunLog
from streamsyn.sink.manifest import Manifest
from streamsyn.sink.mirror import Mirror, mirrored
from streamsyn.sink.mirror_epoch import claim_mirror, read_lists
from streamsyn.sink.mirror_plan import MirrorPlan
from streamsyn.sink.mirror_restore import restore
from streamsyn.sink.mirror_target import MirrorTarget
from streamsyn.sink.rundir import RunDirectory, refuse_different
from tests.builders import context, outcome, rows, sink
from tests.examples import examples

OUTCOMES = 24
URL = "bucket://runs/first"


class Bucket(MemoryFileSystem):  # type: ignore[misc]
    """A store whose writes are whole, and may be created on condition that there is none of the name."""

    protocol = "bucket"
    store: dict[str, Any] = {}  # noqa: RUF012 - as the parent has them
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    before: Callable[[], None] = staticmethod(lambda: None)
    """Called before each write and removal."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("bucket://")))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_options: Any) -> None:
        Bucket.before()
        super().pipe_file(path, value, mode)

    def put_file(self, lpath: str, rpath: str, mode: str = "overwrite", **_options: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes(), mode)

    def rm_file(self, path: str) -> None:
        Bucket.before()
        super().rm_file(path)


@pytest.fixture(autouse=True)
def bucket() -> type[Bucket]:
    """An empty one."""
    return emptied()


def emptied() -> type[Bucket]:
    """The bucket, without files."""
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    Bucket.store, Bucket.pseudo_dirs, Bucket.before = {}, [""], staticmethod(lambda: None)
    return Bucket


def opened(root: Path, url: str = URL, *, takes_over: bool = True) -> RunDirectory:
    """A run directory, which goes on with the run of the mirror if it is empty."""
    directory = RunDirectory(root)
    config = Config()
    try:
        restore(
            directory,
            url,
            lambda saved: refuse_different(url, saved, fingerprint(config)),
            takes_over=takes_over,
        )
        directory.save(config.model_dump(mode="json"), fingerprint(config))
    except BaseException:
        directory.close()
        raise
    return directory


class Coordinator:
    """A run on a node of its own, which writes all outcomes that its log lacks, and mirrors them.

    Args:
        root: Its directory.
        step: 1 or -1, the order of the outcomes, so that shards of one name have different contents.

    Attributes:
        mirrored: The sha256 of the shards that it has found to be in the mirror.
    """

    def __init__(self, root: Path, step: int = 1) -> None:
        self.root = root
        self._order = slice(None, None, step)
        self.mirrored: set[str] = set()
        self._steps = self._write()

    def run(self, steps: int | None = None) -> None:
        """Go on for some steps, or to the end; a run that was taken over, or comes too late, has ended."""
        with suppress(TakenOver, ConfigError):
            for _ in islice(self._steps, steps):
                pass

    def end(self) -> None:
        """Stop here."""
        self._steps.close()

    def _write(self) -> Generator[None, None, None]:
        directory = opened(self.root)
        try:
            log = RunLog(self.root, sink(shard_bytes=1500), epoch=directory.epoch)
            try:
                plan = MirrorPlan(self.root, URL, threading.Event(), takes_over=True)
                plan.begin()
                yield
                yield from self._write_to(log, plan)
            finally:
                log.close(quietly=True)
        finally:
            directory.close()

    def _write_to(self, log: RunLog, plan: MirrorPlan) -> Iterator[None]:
        claims = log.claims()
        numbered = {outcome(number).key: number for number in range(OUTCOMES)}
        finished = claims.finished(list(numbered))
        claims.close()
        missing = [number for key, number in numbered.items() if key not in finished][self._order]
        for at in range(0, len(missing), 4):
            log.append([outcome(number) for number in missing[at : at + 4]])
            log.sync()
            self._mirror(log, plan)
            yield
        log.seal_outcomes()
        log.finish()
        self._mirror(log, plan)

    def _mirror(self, log: RunLog, plan: MirrorPlan) -> None:
        plan.copy({})
        self.mirrored.update(shard.sha256 for shard in log.manifest.shards)


def lists() -> list[bytes]:
    """The lines of the newest manifest."""
    return read_lists(MirrorTarget(URL)).manifest


@examples(40)
@given(number=st.integers(0, 60), before=st.integers(1, 6), meanwhile=st.integers(1, 8))
def test_a_late_write_changes_nothing(number: int, before: int, meanwhile: int) -> None:
    """One write of a run comes after a different one has taken the mirror over, and written some or all."""
    with tempfile.TemporaryDirectory() as folder:
        late_write(Path(folder), number, before, meanwhile)


def late_write(folder: Path, number: int, before: int, meanwhile: int) -> None:
    """Play it.

    Args:
        folder: Has a folder for each node.
        number: Which write of the first run comes late.
        before: Steps of a run before both.
        meanwhile: Steps of the second run before that write; it takes the others later.
    """
    bucket = emptied()
    earlier, first, second, last = (
        Coordinator(folder / name, step) for name, step in zip("abcd", (1, 1, -1, 1), strict=True)
    )
    writes = 0

    def count() -> None:
        nonlocal writes
        writes += 1
        if writes == number + 1:
            second.run(meanwhile)  # its writes are counted too, and none of them comes late

    earlier.run(before)
    bucket.before = staticmethod(count)
    first.run()
    bucket.before = staticmethod(lambda: None)
    second.run()
    last.run()

    numbered = {outcome(number).key: number for number in range(OUTCOMES)}
    found = [numbered[row_key(row)] for kind in ("contexts", "rejects") for row in rows(last.root, kind)]
    assert list(range(OUTCOMES)) == sorted(found)
    assert [] == list(Verification(last.root).problems(None))
    shards = {shard.sha256 for shard in Manifest(last.root / "manifest.jsonl").shards}
    for run in (earlier, first, second, last):
        assert shards >= run.mirrored
        run.end()
    opened(folder / "e").close()  # which compares each shard with the list
    assert (last.root / "manifest.jsonl").read_bytes() == (folder / "e/manifest.jsonl").read_bytes()


@contextmanager
def mirroring(root: Path, url: str = URL) -> Iterator[tuple[RunLog, Mirror]]:
    """A run with its mirror's thread."""
    directory, section = opened(root, url), sink(mirror=url, mirror_timeout_s=20)
    try:
        with mirrored(root, section, directory.epoch) as far:
            assert far is not None
            log = RunLog(root, section, epoch=directory.epoch)
            try:
                far.follow(log)
                yield log, far
            finally:
                log.close(quietly=True)
    finally:
        directory.close()


def test_a_run_without_news_finds_that_it_was_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread looks from time to time; then its next write to its own directory fails, with one line."""
    monkeypatch.setattr(mirror, "CHECK_S", 0.01)
    line = r"the mirror bucket://runs/first was taken over by pid \d+ on .* \(epoch 2\): this process"
    with mirroring(tmp_path / "a") as (log, far):
        claim_mirror(MirrorTarget(URL), tmp_path / "b", takes_over=True)
        far._thread.join(20)
        with pytest.raises(TakenOver, match=line):
            log.append([context(0)])
        with pytest.raises(TakenOver, match=line):
            far.raise_refusal(TakenOver)
        far._refusal = None

    assert [] == lists()


def end_taken_over(root: Path) -> None:
    """A run that loses its mirror while it writes its last rows."""
    with mirroring(root) as (log, _):
        claim_mirror(MirrorTarget(URL), root / "other", takes_over=True)
        with suppress(TakenOver):
            log.append([context(0)])
            log.seal_outcomes()


def test_a_run_that_loses_its_mirror_at_its_end_does_not_end_well(tmp_path: Path) -> None:
    """What it has sealed last is in no list that counts."""
    with pytest.raises(TakenOver):
        end_taken_over(tmp_path / "a")


def test_each_epoch_is_claimed_once(tmp_path: Path) -> None:
    """By all who want it at the same time."""
    with ThreadPoolExecutor(8) as threads:
        claims = list(
            threads.map(
                lambda number: claim_mirror(
                    MirrorTarget(str(tmp_path / "far")), tmp_path / str(number), takes_over=True
                ),
                range(8),
            )
        )

    assert list(range(1, 9)) == sorted(claim.number for claim in claims)
    for claim in claims:
        if claim.number == 8:
            claim.check()
        else:
            with pytest.raises(TakenOver):
                claim.check()


def test_a_claim_whose_answer_was_lost_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client asks again, and is refused by what it has written itself."""
    create, asked = MirrorTarget.create, 0

    def lossy(target: MirrorTarget, name: str, content: bytes | Path) -> None:
        nonlocal asked
        asked += 1
        create(target, name, content)
        if asked == 1:
            raise FileExistsError(name)

    monkeypatch.setattr(MirrorTarget, "create", lossy)

    assert 1 == claim_mirror(MirrorTarget(URL), tmp_path, takes_over=False).number


# Stores that cannot put on condition


class LooksFirst(Bucket):
    """It looks, and then writes, as fsspec's base class does."""

    protocol = "looks"
    pipe_file = AbstractFileSystem.pipe_file


class Ignores(Bucket):
    """It takes the condition, and writes all the same."""

    protocol = "ignores"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        super().pipe_file(path, value, "overwrite", **options)


class Refuses(Bucket):
    """It answers 501 to the condition."""

    protocol = "refuses"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if mode == "create":
            raise OSError(
                "An error occurred (NotImplemented) when calling the PutObject operation: "
                "A header you provided implies functionality that is not implemented"
            )
        super().pipe_file(path, value, mode, **options)


@pytest.mark.parametrize("store", [LooksFirst, Ignores, Refuses])
def test_a_store_without_conditional_puts_is_logged(tmp_path: Path, store: type[Bucket]) -> None:
    """In one line, with what to do. The mirror works all the same."""
    fsspec.register_implementation(store.protocol, store, clobber=True)
    url = f"{store.protocol}://runs/first"
    with capture_logs() as events, mirroring(tmp_path / "a", url) as (log, _):
        log.append([context(number) for number in range(4)])
        log.seal_outcomes()
    second = opened(tmp_path / "b", url)
    second.close()

    warned = [event for event in events if event["log_level"] == "warning"]
    assert ["mirror.not_fenced"] == [event["event"] for event in warned]
    assert "make sure that one run at a time has this mirror" in warned[0]["then"]
    assert [0, 1, 2, 3] == [row["seq"] for row in rows(second.root, "contexts")]


# What is restored, and what is not


def finished(root: Path) -> None:
    """A run with a mirror, to its end."""
    Coordinator(root).run()


def test_an_empty_directory_goes_on_with_the_run(tmp_path: Path) -> None:
    """One line; the epochs of its lines are behind it; a directory that is not empty is left alone."""
    cut_off = Coordinator(tmp_path / "a")
    cut_off.run(4)
    cut_off.end()
    finished(tmp_path / "a")  # so there are lines of two epochs
    with capture_logs() as events:
        directory = opened(tmp_path / "b")
    directory.close()

    assert [("mirror.restored", 18, 6)] == [
        (event["event"], event["contexts"], event["rejects"]) for event in events
    ]
    assert directory.epoch.number > epoch._newest_line(tmp_path / "a/manifest.jsonl") == 2
    assert (tmp_path / "a/manifest.jsonl").read_bytes() == (tmp_path / "b/manifest.jsonl").read_bytes()
    with capture_logs() as events:
        opened(tmp_path / "b").close()
    assert [] == events


def test_a_directory_that_the_run_has_left_is_set_aside(tmp_path: Path) -> None:
    """The node is back, and takes the run over: not with what it had, which is kept beside."""
    first = Coordinator(tmp_path / "a")
    first.run(3)
    first.end()
    left = (tmp_path / "a/manifest.jsonl").read_bytes()
    Coordinator(tmp_path / "b", -1).run(5)
    with pytest.raises(ConfigError, match=r"holds shards that .*/a does not: the run has gone on elsewhere"):
        MirrorPlan(tmp_path / "a", URL, threading.Event(), takes_over=True).begin()
    with capture_logs() as events:
        Coordinator(tmp_path / "a").run()

    assert ["mirror.set_aside", "mirror.restored"] == [
        event["event"] for event in events if event["log_level"] != "debug"
    ]
    (aside,) = (tmp_path / "a").glob("behind-*")
    assert left == (aside / "manifest.jsonl").read_bytes()
    assert [] == list(Verification(tmp_path / "a").problems(None))
    assert OUTCOMES == sum(len(rows(tmp_path / "a", kind)) for kind in ("contexts", "rejects"))
    with capture_logs() as events:
        opened(tmp_path / "a").close()  # it has all now
    assert [] == events


def test_a_fetch_that_was_cut_off_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has left is not taken for a run."""
    finished(tmp_path / "a")
    download, fetched = MirrorTarget.download, 0

    def dying(target: MirrorTarget, *given: Any) -> None:
        nonlocal fetched
        download(target, *given)
        fetched += 1
        if fetched == 2:
            raise OSError("the node is gone")

    monkeypatch.setattr(MirrorTarget, "download", dying)
    with pytest.raises(
        ConfigError, match=r"cannot restore .*/b from sink.mirror bucket://.*the node is gone"
    ):
        opened(tmp_path / "b")
    opened(tmp_path / "b").close()

    assert (tmp_path / "a/manifest.jsonl").read_bytes() == (tmp_path / "b/manifest.jsonl").read_bytes()
    assert [] == list(Verification(tmp_path / "b").problems(None))


def test_a_missing_or_wrong_shard_is_named(tmp_path: Path, bucket: type[Bucket]) -> None:
    """Nothing is begun without it."""
    finished(tmp_path / "a")
    filesystem, path = fsspec.core.url_to_fs(URL)
    shard = f"{path}/contexts/part-000001.jsonl"
    filesystem.pipe_file(shard, b"{}")
    with pytest.raises(
        ConfigError, match=r"contexts/part-000001.jsonl is not what the mirror's manifest lists"
    ):
        opened(tmp_path / "b")
    filesystem.rm_file(shard)
    with pytest.raises(ConfigError, match=r"contexts/part-000001.jsonl, which .* does not exist"):
        opened(tmp_path / "b")


def test_a_different_fingerprint_stops_nobody(tmp_path: Path) -> None:
    """It is refused before the mirror is claimed."""
    first = Coordinator(tmp_path / "a")
    first.run(2)
    directory = RunDirectory(tmp_path / "b")

    def refuse(saved: dict[str, Any]) -> None:
        refuse_different(URL, saved, {**fingerprint(Config()), "recipe.use": "other"})

    line = (
        "bucket://runs/first holds a run with a different configuration .*recipe.use.*different sink.mirror"
    )
    with pytest.raises(ConfigError, match=line):
        restore(directory, URL, refuse, takes_over=False)
    directory.close()
    first.run()

    assert any(b'"final":true' in raw for raw in lists())


def test_a_run_of_this_machine_that_is_alive_is_not_stopped_by_mistake(tmp_path: Path) -> None:
    """Without --take-over it keeps its mirror; when it has ended, anyone may go on."""
    first = Coordinator(tmp_path / "a")
    first.run(2)
    line = (
        rf"bucket://runs/first is in use by pid \d+ on .*, which writes to {tmp_path}/a: stop .* --take-over"
    )
    with pytest.raises(DirectoryInUse, match=line):
        opened(tmp_path / "b", takes_over=False)
    first.run()
    opened(tmp_path / "b", takes_over=False).close()

    assert {outcome(number).key for number in range(OUTCOMES)} == {
        row_key(row) for kind in ("contexts", "rejects") for row in rows(tmp_path / "b", kind)
    }


def test_a_mirror_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes over knows that there was a run, and does not begin it anew. Who does not is warned."""

    def down(*_given: Any) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(MirrorTarget, "sizes", down)
    with pytest.raises(ConfigError, match=r"does not answer \(Connection refused\), and .*/b is empty"):
        opened(tmp_path / "b", takes_over=True)
    with capture_logs() as events:
        opened(tmp_path / "b", takes_over=False).close()

    assert [("mirror.behind", "Connection refused")] == [(event["event"], event["why"]) for event in events]
