"""Signals, pipes, locks, full disks: each leaves a directory that resumes."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.examples import one_in
from tests.system.conftest import COMMAND, Server, assert_clean, rows, start, streamsyn, wait_for_line

Serve = Callable[..., Server]
Seeds = Callable[..., Path]

SLOW = ("--set", "fleet.max_in_flight=8", "--no-progress")


def test_first_signal_drains_and_the_run_resumes(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """What is in flight at a SIGTERM is written, nothing new starts, exit 75; a resume asks only the rest."""
    server, out = serve("--latency-ms", "300"), tmp_path / "out"
    arguments = ["run", "--seeds", seeds(100), "--server", server.url, "--out", out, *SLOW]
    process = start(*arguments)
    wait_for_line(process, "run.started")
    while server.stats()["in_flight"] < 8:
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)

    assert 75 == process.returncode
    asked = server.stats()["requests"]
    assert asked == len(rows(out, "contexts")) < 100
    assert_clean(out)
    assert 0 == streamsyn(*arguments, "--set", "fleet.max_in_flight=100").returncode
    assert 100 == server.stats()["requests"] == len(rows(out, "contexts"))
    assert_clean(out)


@pytest.mark.crash
def test_second_signal_cancels_and_aborts_at_the_server(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """A second SIGINT gives up what is in flight, tells the server by rid, and exits 75 at once."""
    server, out = serve("--latency-ms", "60000"), tmp_path / "out"
    process = start("run", "--seeds", seeds(20), "--server", server.url, "--out", out, *SLOW)
    wait_for_line(process, "run.started")
    while server.stats()["in_flight"] < 8:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    wait_for_line(process, "finishing what is in flight")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)

    assert 75 == process.returncode
    stats = server.stats()
    assert (0, 8) == (stats["in_flight"], stats["by_route"]["/abort_request"])
    assert_clean(out)


@pytest.mark.crash
def test_a_drain_is_bounded(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """After `run.drain_timeout_s` a drain gives up what is still in flight."""
    server, out = serve("--latency-ms", "60000"), tmp_path / "out"
    options = [*SLOW, "--set", "run.drain_timeout_s=0.3"]
    process = start("run", "--seeds", seeds(20), "--server", server.url, "--out", out, *options)
    wait_for_line(process, "run.started")
    while server.stats()["in_flight"] < 8:
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)

    assert 75 == process.returncode


def test_a_signal_while_waiting_for_servers(seeds: Seeds, tmp_path: Path) -> None:
    """Before any server is up a signal ends the run at once, resumable."""
    process = start(
        "run", "--seeds", seeds(2), "--server", "http://127.0.0.1:9", "--out", tmp_path / "o", *SLOW
    )
    wait_for_line(process, "fleet.waiting")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)

    assert 75 == process.returncode


@pytest.mark.crash
def test_a_reader_that_goes_away_ends_the_run(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """`... --stdout | head -n 3` ends with 75; the resume prints what was not delivered, and no more."""
    server, out = serve("--latency-ms", "20"), tmp_path / "out"
    options = [*SLOW, "--set", "sink.sync_interval_s=0.1"]
    run = " ".join(
        [*COMMAND, "run", "--seeds", "-", "--server", server.url, "--out", str(out), "--stdout", *options]
    )
    script = f"cat {seeds(200)} | {run} | head -n 3; exit ${{PIPESTATUS[1]}}"
    piped = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)

    assert 75 == piped.returncode, piped.stderr
    first = [json.loads(line) for line in piped.stdout.splitlines()]
    assert [0, 1, 2] == [sample["seq"] for sample in first]
    recorded = len(rows(out, "samples"))
    assert_clean(out)

    resumed = streamsyn("run", "--out", out, "--stdout", *options)
    rest = [json.loads(line) for line in resumed.stdout.splitlines()]
    assert resumed.returncode == 0, resumed.stderr
    assert list(range(recorded, len(rows(out, "samples")))) == [sample["seq"] for sample in rest]
    assert_clean(out)


@pytest.mark.crash
@pytest.mark.parametrize("stop", ["kill", "two signals"])
def test_a_pipe_that_outlives_runs_loses_no_sample(
    serve: Serve, seeds: Seeds, tmp_path: Path, stop: str
) -> None:
    """Stopped while the pipe is full: the next run on the same pipe writes the torn sample again, whole."""
    server, out = serve(), tmp_path / "out"
    options = [*SLOW, "--set", "sink.sync_interval_s=0.1", "--set", "run.drain_timeout_s=0.1"]
    command = ["run", "--seeds", seeds(60), "--server", server.url, "--out", out, "--stdout", *options]
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096 * 2)
    received = b""
    for _ in range(3):
        process = start(*command, stdout=write)
        wait_for_line(process, "run.started")
        end = len(received) + 70_000
        while len(received) < end:
            received += os.read(read, 5000)
        time.sleep(0.5)  # the pipe fills up in the middle of a sample
        if stop == "kill":
            process.kill()
        else:
            process.send_signal(signal.SIGINT)
            wait_for_line(process, "finishing what is in flight")
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    last = start(*command, stdout=write)
    os.close(write)
    while chunk := os.read(read, 1 << 16):
        received += chunk
    last.communicate(timeout=20)
    os.close(read)

    assert 0 == last.returncode
    found = set()
    for line in received.splitlines():
        with suppress(ValueError):
            found.add(json.loads(line)["id"])
    assert {row["id"] for row in rows(out, "samples")} == found
    assert_clean(out)


def test_stdout_holds_samples_and_nothing_else(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """With --stdout each line is the sample that the log has; all else is on stderr."""
    out = tmp_path / "out"
    done = streamsyn("run", "--seeds", seeds(40), "--server", serve().url, "--out", out, "--stdout", *SLOW)

    assert (out / "samples" / "part-000000.jsonl").read_text() == done.stdout
    assert 40 == len(done.stdout.splitlines())
    assert "run.started" in done.stderr


@pytest.mark.crash
@pytest.mark.parametrize("compression", one_in(2, ["zstd", "none"]))
def test_a_replay_begins_with_what_was_printed_before(
    serve: Serve, seeds: Seeds, tmp_path: Path, compression: str
) -> None:
    """For a reader that has lost some: the same bytes as at first, from sealed shards and the open one, and
    then what is new. Without --replay only what is new."""
    server, out = serve(), tmp_path / "out"
    options = ["--set", f"sink.compression={compression}", "--set", "sink.shard_bytes=2000", *SLOW]
    command = ["run", "--server", server.url, "--out", out, "--stdout", *options, "--seeds"]
    first = streamsyn(*command, seeds(40))
    more = seeds(20, "more.jsonl")
    second = streamsyn(*command, more, "--replay")
    third = streamsyn(*command, more)

    assert (0, 0, 0) == (first.returncode, second.returncode, third.returncode), second.stderr
    assert (40, 60, 0) == tuple(len(done.stdout.splitlines()) for done in (first, second, third))
    assert second.stdout.startswith(first.stdout)
    assert list(range(60)) == [json.loads(line)["seq"] for line in second.stdout.splitlines()]
    assert_clean(out)


@pytest.mark.crash
def test_what_came_through_a_pipe_survives_a_kill(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """Seeds from stdin are spooled: after a kill a run without --seeds finishes what had been read, and
    piping the same seeds again changes nothing."""
    server, out, path = serve("--latency-ms", "50"), tmp_path / "out", seeds(120)
    lines = [*path.read_bytes().splitlines(keepends=True), b"{broken\n"]
    arguments = ["run", "--server", server.url, "--out", str(out), *SLOW]
    process = start(*arguments, "--seeds", "-", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(b"".join(lines))
    process.stdin.flush()  # and it stays open: the end of the seeds never comes
    while len(rows(out, "contexts")) < 20:
        assert process.poll() is None
    process.kill()
    process.communicate()

    finished = streamsyn(*arguments)
    again = streamsyn(*arguments, "--seeds", "-", input=b"".join(lines).decode())

    assert (0, 0) == (finished.returncode, again.returncode), finished.stderr + again.stderr
    assert 120 == len(rows(out, "contexts")) == len({row["seed_id"] for row in rows(out, "contexts")})
    assert ["-:121"] == [row["origin"] for row in rows(out, "rejects")]
    assert 121 == len((out / "spool" / "stdin.jsonl").read_bytes().splitlines())
    assert_clean(out)


@pytest.mark.crash
def test_a_seed_is_spooled_unless_all_its_drafts_are_finished(
    serve: Serve, seeds: Seeds, tmp_path: Path
) -> None:
    """Read from a file and then from a pipe, both killed: a run without seeds finishes every draft."""
    server, out, path = serve("--latency-ms", "500"), tmp_path / "out", seeds(40)
    options = ["--no-progress", "--set", "recipe.contexts_per_seed=3", "--set", "sink.sync_interval_s=0.1"]
    arguments = ["run", "--server", server.url, "--out", str(out), *options]
    spool = out / "spool" / "stdin.jsonl"

    def is_at_end(source: str) -> bool:
        """The first run ends with one or two of three drafts of a seed, the second before it writes any."""
        return bool(rows(out, "contexts") if source != "-" else spool.exists() and spool.read_bytes())

    for source in (str(path), "-"):
        process = start(
            *arguments, "--seeds", source, "--set", "fleet.max_in_flight=2", stdin=subprocess.PIPE
        )
        assert process.stdin is not None
        process.stdin.write(path.read_bytes())
        process.stdin.flush()
        while not is_at_end(source):
            assert process.poll() is None
        process.kill()
        process.communicate()

    finished = streamsyn(*arguments, "--set", "fleet.max_in_flight=40")

    assert finished.returncode == 0, finished.stderr
    drafts = {(row["seed_id"], row["draft"]) for row in rows(out, "contexts")}
    assert 120 == len(rows(out, "contexts")) == len(drafts)
    assert_clean(out)


def test_a_signal_ends_a_run_that_waits_for_stdin(serve: Serve, tmp_path: Path) -> None:
    """A run whose pipe is silent can still be stopped."""
    arguments = ["run", "--seeds", "-", "--server", serve().url, "--out", tmp_path / "out", *SLOW]
    process = start(*arguments, stdin=subprocess.PIPE)
    wait_for_line(process, "run.started")
    process.send_signal(signal.SIGTERM)

    assert 75 == process.wait(10)
    process.communicate()


def test_a_second_process_is_refused(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """Two runs cannot write to one directory; the second says who has it, exit 2."""
    server, out = serve("--latency-ms", "60000"), tmp_path / "out"
    arguments = ["run", "--seeds", seeds(9), "--server", server.url, "--out", out, *SLOW]
    first = start(*arguments)
    wait_for_line(first, "run.started")

    second = streamsyn(*arguments)
    first.kill()
    first.communicate()

    assert 2 == second.returncode
    assert f"{out} is in use by another process (pid {first.pid} " in second.stderr


def test_another_configuration_is_refused(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """A resume that would shape outputs otherwise is refused by key; operational knobs may change."""
    server, out = serve(), tmp_path / "out"
    arguments = ["run", "--seeds", seeds(9), "--server", server.url, "--out", out, *SLOW]
    assert 0 == streamsyn(*arguments).returncode

    refused = streamsyn(*arguments, "--set", "recipe.target_words=77", "--set", "run.seed=5")
    other_model = streamsyn(
        *arguments, "--server", serve("--model", "another").url, "--set", "fleet.model=another"
    )
    knobs = streamsyn(*arguments, "--set", "fleet.request_timeout_s=9", "--set", "sink.sync_interval_s=2")

    assert 2 == refused.returncode
    assert "recipe.target_words: 2000 before, 77 now" in refused.stderr
    assert "run.seed: 0 before, 5 now" in refused.stderr
    assert 2 == other_model.returncode
    assert 0 == knobs.returncode


@pytest.mark.crash
@pytest.mark.parametrize("bound", one_in(2, [120_000, 300_000]))
def test_a_full_disk_stops_the_run_and_loses_nothing(
    serve: Serve, seeds: Seeds, tmp_path: Path, bound: int
) -> None:
    """When a file cannot grow, the run ends with one line and exit 1; with room again it goes on."""
    server, out = serve(), tmp_path / "out"
    arguments = ["run", "--seeds", seeds(150), "--server", server.url, "--out", out, *SLOW]

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bound, bound))

    full = streamsyn(*arguments, preexec_fn=small_files)
    kept = {row["seed_id"] for row in rows(out, "contexts")}
    resumed = streamsyn(*arguments)

    assert 1 == full.returncode
    assert "Traceback" not in full.stderr
    assert "make room and run again" in full.stderr
    assert resumed.returncode == 0, resumed.stderr
    assert kept
    contexts = rows(out, "contexts")
    assert kept <= {row["seed_id"] for row in contexts}
    assert 150 == len(contexts) == len({row["seed_id"] for row in contexts})
    assert_clean(out)


@pytest.mark.crash
def test_a_full_disk_ends_a_run_whose_reader_is_stuck(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """Nobody reads the samples: the run ends all the same, and names the disk."""
    read, write = os.pipe()
    server = serve("--latency-ms", "100")
    command = ["run", "--seeds", seeds(300), "--server", server.url, "--out", tmp_path / "out", "--stdout"]
    command += [*SLOW, "--set", "sink.sync_interval_s=0.05"]

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    done = streamsyn(*command, preexec_fn=small_files, stdout=write, timeout_s=30)
    os.close(write)
    os.close(read)

    assert 1 == done.returncode
    assert "make room and run again" in done.stderr
    assert "Traceback" not in done.stderr


MISTAKES = [
    (
        ["run", "--out", "OUT", "--seeds", "missing.jsonl", "--server", "http://127.0.0.1:9"],
        "missing.jsonl does not exist",
    ),
    (["run", "--out", "OUT", "--seeds", "SEEDS"], "--server URL"),
    (["run", "--out", "OUT", "--server", "http://127.0.0.1:9"], "no seeds"),
    (["run", "--out", "OUT", "--seeds", "SEEDS", "--server", "localhost:30000"], "is not a valid URL"),
    (
        ["run", "--out", "OUT", "--seeds", "SEEDS", "--set", "recipe.target_word=3"],
        "nearest known one is recipe.target_words",
    ),
    (["run", "--out", "OUT", "--seeds", "SEEDS", "--set", "run.seed=soon"], "run.seed"),
    (["run", "--out", "OUT", "--seeds", "SEEDS", "--set", "recipe.use=contxt"], "nearest is 'context'"),
    (["run", "--out", "OUT", "--seeds", "SEEDS", "--set", "recipe.template=nowhere.j2"], "nowhere.j2"),
    (
        ["run", "--out", "OUT", "--stdout", "--seeds", "SEEDS", "--set", "assembly.write=false"],
        "assembly.write",
    ),
    (["run", "--out", "OUT", "--replay", "--seeds", "SEEDS"], "--replay needs --stdout"),
    (["run", "--out", "OUT", "absent.toml"], "absent.toml"),
    (["run", "--out", "OUT", "SEEDS"], "--seeds"),
    (["run", "--out", "OUT", "--seeds", "SEEDS", "--model", "m"], "--set fleet.model=VALUE"),
    (["run", "--out", "OUT", "--seeds", "SEEDS", "--limitt", "3"], "--limit"),
    (["run", "--out", "OUT", "--seeds", "SEEDS", "--limit", "0"], "--limit"),
    (["run", "--seeds", "SEEDS"], "--out"),
    (["verify", "OUT"], "OUT"),
    (["preview"], "--seeds"),
    (["config", "--set", "nonsense"], "KEY=VALUE"),
    (["simulate", "--fault", "nonsense=1"], "nonsense"),
    (["rum"], "rum"),
]


@pytest.mark.parametrize(("arguments", "named"), MISTAKES, ids=[mistake[1] for mistake in MISTAKES])
def test_a_mistake_gets_one_line_and_exit_2(
    arguments: list[str], named: str, seeds: Seeds, tmp_path: Path
) -> None:
    """What the user got wrong is named, without a traceback, exit 2."""
    path = seeds(2)
    done = streamsyn(*[{"SEEDS": str(path)}.get(argument, argument) for argument in arguments], cwd=tmp_path)

    assert 2 == done.returncode, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "OUT").exists()
