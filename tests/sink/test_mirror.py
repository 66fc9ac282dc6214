"""The mirror: sealed shards are copied, verified, then listed; a mirror that fails delays nothing."""

import errno
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from streamsyn.assembly.resources import AssemblyResources
from streamsyn.assembly.window import Passage
from streamsyn.config.fingerprint import fingerprint, with_absolute_paths
from streamsyn.config.loading import Config
from streamsyn.config.sections import SinkSection
from streamsyn.errors import ConfigError
from streamsyn.pipeline.delivery import AssemblyStage
from streamsyn.pipeline.verify import repair, verify
from streamsyn.records import Context, Outcome
from streamsyn.sink import mirror
from streamsyn.sink.completed_keys import row_key
from streamsyn.sink.log import RunLog
from streamsyn.sink.mirror import mirrored
from streamsyn.sink.mirror_plan import MirrorPlan
from streamsyn.sink.rundir import RunDirectory
from tests.builders import context, outcome, rows, sealed_bytes
from tests.examples import examples
from tests.export.support import Outlet

Log = list[Any]


class Shaky(MemoryFileSystem):  # type: ignore[misc]
    """A file system that goes wrong as a test wants it."""

    protocol = "shaky"
    store: dict[str, Any] = {}  # noqa: RUF012 - as the parent has them
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    written: list[str] = []  # noqa: RUF012
    before: Callable[[str, str], None] = staticmethod(lambda mode, path: None)
    """Called with each file that is opened."""
    corrupt: set[str] = set()  # noqa: RUF012
    """Names of which the next copy has a wrong byte."""
    cut: set[str] = set()  # noqa: RUF012
    """Names of which half is copied, and no more."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("shaky://")))

    def _open(self, path: str, mode: str = "rb", **given: Any) -> Any:
        Shaky.before(mode, path)
        if mode == "wb":
            Shaky.written.append(path)
        return super()._open(path, mode, **given)

    def put_file(self, lpath: str, rpath: str, **given: Any) -> None:
        super().put_file(lpath, rpath, **given)
        name = rpath.rpartition("/")[2]
        if name in Shaky.cut:
            file = self.store[self._strip_protocol(rpath)]
            file.truncate(len(file.getvalue()) // 2)
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        if name in Shaky.corrupt:
            Shaky.corrupt.remove(name)
            file = self.store[self._strip_protocol(rpath)]
            data = bytearray(file.getvalue())
            data[len(data) // 2] ^= 1
            file.seek(0)
            file.write(data)


@pytest.fixture
def shaky(monkeypatch: pytest.MonkeyPatch) -> type[Shaky]:
    """Empty, sound, and asked again without a pause."""
    fsspec.register_implementation("shaky", Shaky, clobber=True)
    Shaky.store, Shaky.pseudo_dirs, Shaky.written = {}, [""], []
    Shaky.corrupt, Shaky.cut = set(), set()
    Shaky.before = staticmethod(lambda mode, path: None)
    monkeypatch.setattr(mirror, "BACKOFF_S", 0.001)
    return Shaky


class Run:
    """A run in steps: contexts come, samples are made of them, the log is sealed at the end."""

    def __init__(self, root: Path, log: RunLog, config: Config) -> None:
        self.log = log
        self._stage = AssemblyStage(
            lambda: AssemblyResources(config.assembly).assembler(config.run.seed),
            log,
            Outlet(log),
            logged=log.contexts.rows,
            delivered=log.samples.rows,
            flushes=log.manifest.flushes,
        )
        self._stage.catch_up()
        self._config = config
        self._root = root

    def write(self, outcomes: int) -> None:
        """Log so many more, and make the samples that are due."""
        first = self.log.outcomes
        self.log_all([outcome(first + n) for n in range(outcomes)])

    def log_all(self, outcomes: list[Outcome]) -> None:
        """Log these, and make the samples that are due."""
        written = self.log.append(outcomes)
        self.log.sync()
        for seq, one in written:
            if isinstance(one, Context):
                self._stage._take([Passage.of_context(seq, one)])

    def finish(self) -> None:
        """Come to the end."""
        self.log.seal_outcomes()
        self._stage.finish()
        self.log.finish()


def config_of(url: str | None, timeout_s: float = 30) -> Config:
    sink = {"shard_bytes": 3000, "mirror": url, "mirror_timeout_s": timeout_s}
    return Config.model_validate({"sink": sink, "assembly": {"contexts_per_sample": 3}})


@contextmanager
def running(root: Path, url: str | None, timeout_s: float = 30) -> Iterator[Run]:
    """A run with a mirror, as `run` has it."""
    config = config_of(url, timeout_s)
    directory = RunDirectory(root)
    try:
        with mirrored(root, config.sink) as far:
            log = RunLog(root, config.sink)
            if far is not None:
                far.follow(log)
            try:
                shaping = {**fingerprint(config), **AssemblyResources(config.assembly).fingerprint()}
                directory.save(with_absolute_paths(config), shaping)
                yield Run(root, log, config)
            finally:
                log.close()
    finally:
        directory.close()


def download(url: str, to: Path) -> Path:
    """A mirror as a folder."""
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.get(f"{path}/", f"{to}/", recursive=True)
    return to


def assert_same(root: Path, copy: Path) -> None:
    """The mirror holds all that is sealed, and is sound."""
    assert sealed_bytes(root) == sealed_bytes(copy)
    assert (root / "manifest.jsonl").read_bytes() == (copy / "manifest.jsonl").read_bytes()
    assert (root / "run.json").read_bytes() == (copy / "run.json").read_bytes()
    problems, found = verify(copy)
    assert ([], []) == (problems, found.notes)


def warnings(events: Log) -> Log:
    return [event for event in events if event["event"] == "mirror.behind"]


# What is there


@pytest.mark.parametrize("scheme", ["file://", "", "memory://", "shaky://"])
def test_a_finished_run_is_there(tmp_path: Path, shaky: type[Shaky], scheme: str) -> None:
    """Every sealed shard, run.json and the manifest: a run directory that `verify` finds sound."""
    place = tmp_path / "far"
    url = f"{scheme}{place}" if scheme in ("file://", "") else f"{scheme}{tmp_path.name}/a/b"
    with capture_logs() as events, running(tmp_path / "run", url) as run:
        run.write(40)
        run.finish()

    copy = place if place.exists() else download(url, tmp_path / "copy")
    assert [] == warnings(events)
    assert_same(tmp_path / "run", copy)
    assert len(sealed_bytes(copy)) > 6


def test_a_run_resumes_from_its_mirror(tmp_path: Path) -> None:
    """A machine is lost in the middle: the mirror, copied back, resumes and ends the same."""
    with running(tmp_path / "run", str(tmp_path / "far")) as run:
        run.write(30)
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(tmp_path / "far", tmp_path / "run")
    with running(tmp_path / "run", str(tmp_path / "far")) as run:
        before = {row_key(row) for kind in ("contexts", "rejects") for row in rows(tmp_path / "run", kind)}
        run.log_all([one for n in range(40) if (one := outcome(n)).key not in before])
        run.finish()

    assert 0 < len(before) < 30
    assert_same(tmp_path / "run", tmp_path / "far")
    assert {"contexts": 30, "rejects": 10, "samples": 30} == verify(tmp_path / "far")[1].counts


@given(steps=st.lists(st.integers(0, 9), min_size=1, max_size=12), keep=st.booleans())
@examples(15)
def test_at_any_time_it_is_a_sound_run(steps: list[int], *, keep: bool) -> None:
    """However far copying falls behind, with index/mirror.json or without: no problem in the mirror."""
    with tempfile.TemporaryDirectory() as name, running(Path(name) / "run", None) as run:
        root, far = Path(name) / "run", Path(name) / "far"
        needed: dict[str, int] = {}

        def on_line(line: Any) -> None:
            if getattr(line, "kind", "") == "samples":
                needed[line.path] = run.log.contexts.rows

        run.log.manifest.on_line = on_line
        copying = MirrorPlan(root, str(far), threading.Event())
        copying.begin()
        for number, step in enumerate(steps):
            run.write(step) if number < len(steps) - 1 else run.finish()
            if step % 3:
                continue
            if not keep:
                (root / "index/mirror.json").unlink(missing_ok=True)
                copying = MirrorPlan(root, str(far), threading.Event())
                copying.begin()
            copying.copy(needed)
            assert [] == copying.missing(needed)
            if (far / "manifest.jsonl").exists():
                assert [] == verify(far)[0]
                assert all("not listed" not in note for note in verify(far)[1].notes)
        copying.copy(needed)
        assert [] == verify(far)[0] if (far / "manifest.jsonl").exists() else sum(steps[:-1]) == 0


# What goes wrong on the way


def test_a_copy_is_tried_until_it_works(tmp_path: Path, shaky: type[Shaky]) -> None:
    """One in three files cannot be opened: all is copied in the end, and each failure is logged."""
    failed, rng = 0, Random(0)

    def before(mode: str, path: str) -> None:
        nonlocal failed
        if rng.random() < 1 / 3:
            failed += 1
            raise OSError(errno.EIO, f"no luck with {path}")

    shaky.before = staticmethod(before)
    with capture_logs() as events, running(tmp_path / "run", "shaky://far") as run:
        run.write(40)
        run.finish()

    shaky.before = staticmethod(lambda mode, path: None)
    assert_same(tmp_path / "run", download("shaky://far", tmp_path / "copy"))
    assert failed == len(warnings(events)) > 3
    assert all("Input/output" in event["why"] or "no luck" in event["why"] for event in warnings(events))


def test_tries_that_make_progress_are_not_delayed_ever_longer(tmp_path: Path, shaky: type[Shaky]) -> None:
    """A mirror that copies a file or two between failures catches up: pauses grow over those in a row."""
    finished, opened = threading.Event(), count()

    def before(mode: str, path: str) -> None:
        finished.wait(30)
        if next(opened) % 4 == 3:
            raise OSError(errno.EIO, f"no luck with {path}")

    with capture_logs() as events, running(tmp_path / "run", "shaky://far", timeout_s=10) as run:
        shaky.before = staticmethod(before)
        run.write(120)
        run.finish()
        finished.set()

    shaky.before = staticmethod(lambda mode, path: None)
    assert_same(tmp_path / "run", download("shaky://far", tmp_path / "copy"))
    assert len(warnings(events)) > 20


def test_a_wrong_byte_is_found_and_copied_again(tmp_path: Path, shaky: type[Shaky]) -> None:
    """What was written is read back; a shard is not listed before it is right."""
    shaky.corrupt = {"part-000001.jsonl"}
    with capture_logs() as events, running(tmp_path / "run", "shaky://far") as run:
        run.write(40)
        run.finish()

    assert_same(tmp_path / "run", download("shaky://far", tmp_path / "copy"))
    assert ["was not read back as it was written" in event["why"] for event in warnings(events)] == [True]


def test_half_a_shard_is_a_torn_end(tmp_path: Path, shaky: type[Shaky]) -> None:
    """Half of a copy is never listed: the shard gets a different name. The mirror is sound, and resumes."""
    shaky.cut = {"part-000002.jsonl"}
    with running(tmp_path / "run", "shaky://far", timeout_s=2) as run:
        run.write(40)
    shutil.rmtree(tmp_path / "run")
    copy = download("shaky://far", tmp_path / "run")
    problems, found = verify(copy)
    shaky.cut = set()
    with running(copy, "shaky://far") as run:
        done = {row_key(row) for kind in ("contexts", "rejects") for row in rows(copy, kind)}
        run.log_all([one for n in range(40) if (one := outcome(n)).key not in done])
        run.finish()

    assert [] == problems
    assert [] == [note for note in found.notes if "not listed" in note]
    far = download("shaky://far", tmp_path / "copy")
    assert [] == verify(far)[0]
    assert {"contexts": 30, "rejects": 10, "samples": 30} == verify(far)[1].counts
    assert (far / "contexts/part-000002.e00000001.jsonl").exists()


def test_a_mirror_that_hangs_delays_nothing(tmp_path: Path, shaky: type[Shaky]) -> None:
    """The log is written and the run ends in time; what is missing is named, and copied by the next run."""
    hanging, release = threading.Event(), threading.Event()

    def before(mode: str, path: str) -> None:
        if mode == "wb" and path.endswith("part-000001.jsonl"):
            hanging.set()
            release.wait(50)

    shaky.before = staticmethod(before)
    with capture_logs() as events, running(tmp_path / "run", "shaky://far", timeout_s=0.05) as run:
        run.write(20)
        assert hanging.wait(20)
        run.write(20)
        run.finish()
    shaky.before = staticmethod(lambda mode, path: None)
    half = download("shaky://far", tmp_path / "half")
    release.set()
    with running(tmp_path / "run", "shaky://far"):
        pass

    assert {"contexts": 30, "rejects": 10, "samples": 30} == verify(tmp_path / "run")[1].counts
    said = warnings(events)[-1]
    assert "contexts/part-000001.jsonl" in said["missing"] or "rejects/part-000001" in said["missing"]
    assert said["files"] > 3
    assert [] == verify(half)[0]
    assert_same(tmp_path / "run", download("shaky://far", tmp_path / "copy"))


def test_a_mirror_that_is_down_is_waited_for(tmp_path: Path, shaky: type[Shaky]) -> None:
    """The run begins all the same; when the mirror is up, what has been sealed is copied."""
    down, tried = True, threading.Event()

    def before(mode: str, path: str) -> None:
        if down:
            tried.set()
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    shaky.before = staticmethod(before)
    with capture_logs() as events, running(tmp_path / "run", "shaky://far") as run:
        run.write(20)
        assert tried.wait(20)
        down = False
        run.write(20)
        run.finish()

    assert_same(tmp_path / "run", download("shaky://far", tmp_path / "copy"))
    assert "Connection refused" == warnings(events)[0]["why"]


def test_an_error_of_the_run_does_not_wait(tmp_path: Path, shaky: type[Shaky]) -> None:
    """It is raised at once; the next run copies the rest."""
    release = threading.Event()

    def before(mode: str, path: str) -> None:
        if "part-" in path:
            release.wait(50)

    def fail() -> None:
        with running(tmp_path, "shaky://far", timeout_s=1000) as run:
            run.write(20)
            raise RuntimeError("ours")

    shaky.before = staticmethod(before)
    with pytest.raises(RuntimeError, match="ours"):
        fail()
    release.set()


# Runs one after the other


def test_what_was_verified_is_not_copied_again(tmp_path: Path, shaky: type[Shaky]) -> None:
    """Nor read; with index/mirror.json lost, it is read but not copied."""
    with running(tmp_path, "shaky://far") as run:
        run.write(40)
        run.finish()
    read: list[str] = []
    shaky.written.clear()
    shaky.before = staticmethod(lambda mode, path: read.append(path) if mode == "rb" else None)
    with running(tmp_path, "shaky://far"):
        pass
    first = [path for path in read if "part-" in path]
    (tmp_path / "index/mirror.json").unlink()
    read.clear()
    with running(tmp_path, "shaky://far"):
        pass

    assert [] == first
    assert len(sealed_bytes(tmp_path)) == len([path for path in read if "part-" in path])
    assert [] == [path for path in shaky.written if "part-" in path]


def test_what_was_lost_there_is_copied_again(tmp_path: Path) -> None:
    """A shard that is gone, cut or changed in the mirror, when index/mirror.json is lost too."""
    root, far = tmp_path / "run", tmp_path / "far"
    with running(root, str(far)) as run:
        run.write(40)
        run.finish()
    (far / "contexts/part-000000.jsonl").unlink()
    (far / "contexts/part-000001.jsonl").write_bytes(b"{}\n")
    with running(root, str(far)):
        pass
    changed = (far / "samples/part-000000.jsonl").read_bytes().replace(b"text", b"TEXT", 1)
    (far / "samples/part-000000.jsonl").write_bytes(changed)
    (root / "index/mirror.json").write_bytes(b'{"url":')
    with running(root, str(far)):
        pass

    assert_same(root, far)


def test_samples_that_a_repair_dropped_go_from_the_mirror_too(tmp_path: Path) -> None:
    """The mirror holds no shard of samples that it does not list."""
    root, far = tmp_path / "run", tmp_path / "far"
    with running(root, str(far)) as run:
        run.write(40)
        run.finish()
    path = root / "samples/part-000001.jsonl"
    path.write_bytes(path.read_bytes().replace(b"text", b"TEXT", 1))
    repair(root)
    with running(root, str(far)):
        pass
    assert sealed_bytes(root) == sealed_bytes(far)
    assert [] == verify(far)[0]
    with running(root, str(far)) as run:
        run.finish()

    assert_same(root, far)


# What is refused


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nowhere://a", "sink.mirror: nowhere://a cannot be used: Protocol not known"),
        ("s3://bucket/a", "sink.mirror: s3://bucket/a needs a package that is not installed"),
        ("OUT", "is inside the run directory"),
        ("file://OUT/mirror", "is inside the run directory"),
        ("OUT/../OUT_NAME/x", "is inside the run directory"),
    ],
)
def test_an_unusable_mirror_is_refused(tmp_path: Path, url: str, says: str) -> None:
    """One line, before anything is written to it."""
    url = url.replace("OUT_NAME", tmp_path.name).replace("OUT", str(tmp_path))
    with pytest.raises(ConfigError, match=says), running(tmp_path, url):
        pass


def test_the_mirror_of_a_different_run_is_refused(tmp_path: Path) -> None:
    """Even by a run that has written nothing yet; and nothing in the mirror is changed."""
    far = tmp_path / "far"
    with running(tmp_path / "a", str(far)) as run:
        run.write(20)
        run.finish()
    before = sealed_bytes(far)
    with running(tmp_path / "b", None) as run:
        run.write(20)
    for other in ("b", "new"):
        with pytest.raises(ConfigError, match="holds a different run"), running(tmp_path / other, str(far)):
            pass

    assert before == sealed_bytes(far)


def test_a_mirror_that_holds_more_is_refused(tmp_path: Path) -> None:
    """A directory from an older copy would overwrite contexts in the mirror."""
    root, far = tmp_path / "run", tmp_path / "far"
    with running(root, str(far)) as run:
        run.write(10)
    shutil.copytree(root, tmp_path / "older")
    with running(root, str(far)) as run:
        run.write(30)
        run.finish()
    with (
        pytest.raises(ConfigError, match=r"holds shards that .*older does not"),
        running(tmp_path / "older", str(far)),
    ):
        pass

    assert_same(root, far)


def test_without_a_mirror_nothing_happens(tmp_path: Path) -> None:
    """No thread, no file; an empty URL switches off what run.json remembers."""
    threads = threading.active_count()
    with running(tmp_path, "") as run:
        run.write(10)
        assert threads == threading.active_count()

    assert not (tmp_path / "index/mirror.json").exists()
    assert SinkSection().mirror is None


def test_an_open_shard_is_not_copied(tmp_path: Path) -> None:
    """It still changes."""
    with running(tmp_path / "run", str(tmp_path / "far")) as run:
        run.log.append([context(0)])

    assert ["epochs", "run.json"] == sorted(path.name for path in (tmp_path / "far").iterdir())
