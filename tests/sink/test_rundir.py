"""The run directory: one writer at a time, and only under the configuration it was made with."""

import fcntl
import os
import platform
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import orjson
import pytest

from streamsyn.config.fingerprint import fingerprint
from streamsyn.config.loading import load
from streamsyn.errors import ConfigError, DirectoryInUse, SinkError
from streamsyn.io.durable import write_whole
from streamsyn.sink.rundir import RunDirectory, holder_of, read_run_json, saved_config, wait_until_free
from tests.builders import disk_full_beyond

HOLDER = """
import sys
from contextlib import nullcontext
from pathlib import Path
from streamsyn.sink.rundir import RunDirectory

directory = RunDirectory(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    """The process that holds the lock is named by its pid; SIGKILL releases the lock."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert "held\n" == holder.stdout.readline()
        with pytest.raises(DirectoryInUse) as raised:
            RunDirectory(tmp_path)
        holder.send_signal(signal.SIGKILL)

    assert f"{tmp_path} is in use by another process (pid {holder.pid} on {platform.node()})" == str(
        raised.value
    )
    RunDirectory(tmp_path).close()


def test_the_same_process_is_refused_as_well(tmp_path: Path) -> None:
    """One process cannot open a directory twice; after `close` it can, and the pid is right again."""
    first = RunDirectory(tmp_path)

    for _ in range(2):
        with pytest.raises(DirectoryInUse, match=f"pid {os.getpid()} "):
            RunDirectory(tmp_path)
    first.close()
    RunDirectory(tmp_path).close()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """A file in its place is a configuration error."""
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match=re.escape(f"cannot make the run directory {tmp_path / 'file'}: ")):
        RunDirectory(tmp_path / "file")


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """One that a run was made in."""
    directory = RunDirectory(tmp_path)
    config = load(None)
    directory.save(config.model_dump(mode="json"), {**fingerprint(config), "model": "m"})
    return directory


def test_the_same_configuration_goes_on(directory: RunDirectory) -> None:
    """The fingerprint of the same configuration differs in nothing, with the model or before it is known."""
    shaping = fingerprint(load(None))

    directory.check(shaping)
    directory.check({**shaping, "model": "m"})


def test_keys_that_differ_are_named_with_both_values(directory: RunDirectory) -> None:
    """Every key that shapes outputs and differs is named, with the value before and now."""
    changed = load(None, [("recipe.target_words", 10), ("run.seed", 7), ("recipe.sampling.top_p", 0.5)])

    with pytest.raises(ConfigError) as raised:
        directory.check({**fingerprint(changed), "model": "other"})
    assert (
        f"{directory.root} holds a run with a different configuration ("
        "model: 'm' before, 'other' now; recipe.sampling.top_p: None before, 0.5 now; "
        "recipe.target_words: 2000 before, 10 now; run.seed: 0 before, 7 now); choose a different --out"
    ) == str(raised.value)


def test_operational_keys_may_change(directory: RunDirectory) -> None:
    """Servers, concurrency, timeouts and shard sizes may differ."""
    changed = [
        ("fleet.servers", ["http://elsewhere"]),
        ("fleet.max_in_flight", 7),
        ("fleet.request_timeout_s", 1),
        ("run.drain_timeout_s", 1),
        ("run.queue_size", 3),
        ("sink.shard_bytes", 5),
        ("sink.sync_interval_s", 9),
        ("seeds.limit", 4),
    ]

    directory.check(fingerprint(load(None, changed)))


def test_the_compression_may_not_change(directory: RunDirectory) -> None:
    """The names of the log's files depend on it."""
    with pytest.raises(ConfigError, match=r"sink\.compression: 'none' before, 'zstd' now"):
        directory.check(fingerprint(load(None, [("sink.compression", "zstd")])))


def test_a_template_counts_by_its_text(tmp_path: Path) -> None:
    """A long value is cut in the message; the path of the template does not matter."""
    for name, text in (("a", "same {{ instruction }}"), ("b", "same {{ instruction }}"), ("c", "x" * 99)):
        (tmp_path / name).write_text(text)
    directory = RunDirectory(tmp_path / "out")
    a, b, c = (fingerprint(load(None, [("assembly.template", str(tmp_path / name))])) for name in "abc")
    directory.save({}, a)

    directory.check(b)
    with pytest.raises(ConfigError, match=r"'same \{\{ instruction \}\}' before, 'x{56}\.\.\. now"):
        directory.check(c)


def test_run_json_keeps_when_the_run_began(directory: RunDirectory) -> None:
    """A later run updates run.json and keeps `created_at`."""
    before = directory.saved() or {}
    directory.save({"new": 1}, {})
    after = directory.saved() or {}

    assert (before["created_at"], {"new": 1}, 1) == (after["created_at"], after["config"], after["format"])
    assert after["updated_at"] > before["updated_at"]


def test_a_format_of_the_future_is_refused(tmp_path: Path) -> None:
    """A run directory that a later streamsyn wrote is not touched."""
    (tmp_path / "run.json").write_bytes(orjson.dumps({"format": 2}))

    with pytest.raises(ConfigError, match=r"run\.json has format 2; this streamsyn reads format 1"):
        read_run_json(tmp_path)


def test_a_broken_run_json_is_named(tmp_path: Path) -> None:
    """Invalid JSON is a configuration error; no file means a new directory."""
    assert read_run_json(tmp_path) is None
    (tmp_path / "run.json").write_text("{")

    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'run.json'} cannot be read: ")):
        read_run_json(tmp_path)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ([], "is not a valid run.json: it is not a JSON object"),
        ({"format": 1, "fingerprint": {}}, "is not a valid run.json: it has no config"),
        ({"format": 1, "config": {}, "fingerprint": 1}, "is not a valid run.json: it has no fingerprint"),
        ({"format": [1]}, "has format [1]; this streamsyn reads format 1"),
    ],
)
def test_an_invalid_run_json_is_named(tmp_path: Path, data: object, what: str) -> None:
    """One line, whatever it holds."""
    path = tmp_path / "run.json"
    path.write_bytes(orjson.dumps(data))

    with pytest.raises(ConfigError) as raised:
        read_run_json(tmp_path)
    assert f"{path} {what}" == str(raised.value)


def test_the_saved_configuration_is_there_again(tmp_path: Path) -> None:
    """Even if JSON cannot hold all of it: an operational `inf` counts as not set."""
    assert saved_config(tmp_path) is None
    config = load(None, [("fleet.give_up_s", float("inf")), ("recipe.target_words", 7)])
    directory = RunDirectory(tmp_path)
    directory.save(config.model_dump(mode="json"), {})

    assert load(None, [("recipe.target_words", 7)]) == saved_config(tmp_path)


@pytest.mark.parametrize("config", [{"run": 5}, {"run": {"seed": "x"}}, {"run": {"sed": 1}}, {"new": {}}])
def test_a_saved_configuration_that_is_not_known_is_named(
    directory: RunDirectory, config: dict[str, object]
) -> None:
    """One line, with the file and the key."""
    directory.save(config, {})

    with pytest.raises(ConfigError, match=r"^[^\n]*run\.json: [^\n]*(run|new)[^\n]*$"):
        saved_config(directory.root)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """With no room for the new one, the old one is still there."""
    path = tmp_path / "state.json"
    write_whole(path, b"old")
    with disk_full_beyond(100), pytest.raises(SinkError, match=re.escape(f"cannot write {path}: ")):
        write_whole(path, b"new" * 100)

    assert b"old" == path.read_bytes()


def test_a_key_that_is_newer_than_the_run(tmp_path: Path) -> None:
    """It had its default then: the run resumes under a newer version, unless the key is set differently."""
    directory = RunDirectory(tmp_path)
    try:
        directory.save({}, {"recipe.use": "context"})
        defaults = {"recipe.target_tokens": 8000}
        directory.check({"recipe.use": "context", "recipe.target_tokens": 8000}, defaults)
        with pytest.raises(ConfigError, match=r"recipe\.target_tokens: 8000 before, 9000 now"):
            directory.check({"recipe.use": "context", "recipe.target_tokens": 9000}, defaults)
    finally:
        directory.close()


def test_a_new_directory_survives_a_loss_of_power(tmp_path: Path, synced: list[Path]) -> None:
    """Each folder that is made is synced in its parent."""
    RunDirectory(tmp_path / "runs" / "first").close()

    assert {tmp_path, tmp_path / "runs", tmp_path / "runs" / "first"} <= set(synced)


def test_a_foreign_directory_is_refused(tmp_path: Path) -> None:
    """Something else's files are named; configurations, logs and hidden files may be there before a run."""
    for name in ("run.toml", "prompt.j2", "sglang.log", ".gitignore"):
        (tmp_path / name).touch()
    RunDirectory(tmp_path).close()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()

    with pytest.raises(ConfigError, match=r"--out .*foreign is not a run directory.*thesis.tex"):
        RunDirectory(foreign)
    assert ["thesis.tex"] == [path.name for path in foreign.iterdir()]


@pytest.mark.parametrize("looks", [1, 999, 1001])
def test_who_looks_at_a_lock_refuses_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    """`status` and those who wait hold it shared for a moment, in which a run may begin. Not for good."""
    RunDirectory(tmp_path).close()
    looking = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    flock, tries = fcntl.flock, []

    def tried(file: int, how: int) -> None:
        if how & fcntl.LOCK_EX:
            tries.append(how)
        if len(tries) > looks:
            flock(looking, fcntl.LOCK_UN)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", tried)
    with pytest.raises(DirectoryInUse) if looks > 1000 else nullcontext():
        RunDirectory(tmp_path).close()
    os.close(looking)


def test_looking_at_a_lock_takes_it_from_nobody(tmp_path: Path) -> None:
    """Whoever holds it is named; two may look at once."""
    assert holder_of(tmp_path) is None
    directory = RunDirectory(tmp_path)
    assert f"pid {os.getpid()} on {platform.node()}" == holder_of(tmp_path)
    with pytest.raises(DirectoryInUse):
        RunDirectory(tmp_path)
    directory.close()
    looking = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    waited: list[str] = []
    wait_until_free(tmp_path, waited.append)
    assert holder_of(tmp_path) is None
    assert [] == waited
    os.close(looking)


def test_a_run_of_a_daemon_is_not_taken_over(tmp_path: Path) -> None:
    """The daemon would acknowledge seeds that it writes to a file without a name."""
    hosted = RunDirectory(tmp_path)
    (tmp_path / "service.json").touch()
    with pytest.raises(ConfigError, match=r"is a run of a daemon.*in use by another process"):
        RunDirectory(tmp_path, take_over=True)
    hosted.epoch.check()
    hosted.close()
    RunDirectory(tmp_path, take_over=True).close()
