"""The command line at its edges: closed streams, readers that are gone, logs for programs, early signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.examples import one_in
from tests.system.conftest import COMMAND, Server, rows, start, streamsyn, wait_for_line

Serve = Callable[..., Server]
Seeds = Callable[..., Path]

NOWHERE = ("--server", "http://127.0.0.1:9")


def shell(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `streamsyn` is ours."""
    define = f'streamsyn() {{ {" ".join(COMMAND)} "$@"; }}; '
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        ["bash", "-c", define + script],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def events(stderr: str) -> list[dict[str, Any]]:
    """Each line of stderr is an object."""
    return [json.loads(line) for line in stderr.splitlines()]


@pytest.mark.parametrize(
    ("script", "named"),
    one_in(
        3,
        [
            ("streamsyn run --out OUT --seeds - --server http://127.0.0.1:9 <&-", "stdin (`-`) is closed"),
            (
                "streamsyn run --out OUT --seeds - --server http://127.0.0.1:9 --stdout <&-",
                "stdin (`-`) is cl",
            ),
            ("streamsyn preview --seeds - <&-", "stdin (`-`) is closed"),
            (
                "streamsyn run --out OUT --seeds SEEDS --server http://127.0.0.1:9 --stdout >&-",
                "stdout is closed",
            ),
            ("mkfifo p.jsonl; streamsyn preview --seeds p.jsonl", "p.jsonl is a named pipe"),
            ("mkfifo p.jsonl; streamsyn preview --seeds .", "p.jsonl is a named pipe"),
            ("streamsyn preview --seeds /dev/null", "/dev/null is neither a file nor a directory"),
            ("ln -s nowhere l.jsonl; streamsyn preview --seeds l.jsonl", "l.jsonl is a link to nothing"),
            ("streamsyn preview --seeds $(printf 'x%.0s' {1..300}).jsonl", "File name too long"),
            ("streamsyn preview --seeds ''", "a path is empty"),
        ],
    ),
)
def test_what_cannot_be_read_or_written_gets_one_line(
    script: str, named: str, seeds: Seeds, tmp_path: Path
) -> None:
    """Exit 2, at once, and no run directory."""
    done = shell(script.replace("SEEDS", str(seeds(2, "some.jsonl"))), tmp_path)

    assert 2 == done.returncode, done.stderr
    assert named in done.stderr
    assert 1 == len(done.stderr.splitlines())
    assert not (tmp_path / "OUT").exists()


def test_a_run_directory_is_no_source_of_seeds(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """OUT below the seeds is left aside, by a resume and by a glob; given itself it is refused."""
    seeds(5)
    out = tmp_path / "out"
    arguments = ["run", "--server", serve().url, "--out", out, "--no-progress", "--seeds"]

    ended = [
        streamsyn(*arguments, source) for source in (tmp_path, tmp_path, tmp_path / "**", f"{tmp_path}/*")
    ]
    given = streamsyn("preview", "--seeds", out)

    assert [0] * 4 == [done.returncode for done in ended], ended[-1].stderr
    assert 5 == len(rows(out, "contexts"))
    assert [] == rows(out, "rejects")
    assert 2 == given.returncode
    assert f"streamsyn: seeds: {out} is a run directory; give files of rows instead\n" == given.stderr


def test_preview_takes_the_command_line_of_a_run(seeds: Seeds, tmp_path: Path) -> None:
    """One word is changed; what has no meaning there is ignored, and nothing is written."""
    options = ["--stdout", "--no-progress", "--log-json", "--launch", "m", "--sglang-python", "p"]
    out = tmp_path / "out"
    done = streamsyn(
        "preview", "--seeds", seeds(9), *NOWHERE, "--out", out, *options, "--sglang-arg", "--x", "--limit", 2
    )

    assert (0, "") == (done.returncode, done.stderr)
    assert 2 == done.stdout.count("=== ")
    assert not out.exists()


def test_preview_without_a_reader_is_quiet(seeds: Seeds, tmp_path: Path) -> None:
    """`streamsyn preview | head` says nothing of pipes."""
    done = shell(
        f"streamsyn preview --seeds {seeds(999)} --limit 999 | head -n 1; exit ${{PIPESTATUS[0]}}", tmp_path
    )

    assert (0, "") == (done.returncode, done.stderr)


def test_with_log_json_stderr_is_for_programs(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """One object a line; the summary is the event `run.done`."""
    path, out = seeds(30), tmp_path / "out"
    with path.open("a") as file:
        file.write("nix\n")
    done = streamsyn(
        "run",
        "--seeds",
        path,
        "--server",
        serve().url,
        "--out",
        out,
        "--log-json",
        "--set",
        "run.max_reject_fraction=0",
    )

    *_, before, last = events(done.stderr)
    assert (3, "run.failed", 3) == (done.returncode, last["event"], last["exit_code"])
    assert last["error"].startswith("rejects are 3.2% of the outcomes")
    assert ("run.done", 30, {"invalid_json": 1}, 30, None, str(out)) == tuple(
        before[key] for key in ("event", "contexts", "rejects", "samples", "stopped", "out")
    )
    assert before["useful_tokens"] > 0 == before["wasted_tokens"]
    assert before["seconds"] > 0


@pytest.mark.parametrize(
    ("more", "code", "named"),
    [
        (("--seeds", "missing.jsonl"), 2, "missing.jsonl does not exist"),
        (("--sedes", "x"), 2, "--sedes"),
        (("--seeds", "SEEDS", "--set", "fleet.give_up_s=0.2"), 75, None),
    ],
)
def test_with_log_json_an_error_is_an_event(
    more: tuple[str, ...], code: int, named: str | None, seeds: Seeds, tmp_path: Path
) -> None:
    """Mistakes in the command line too; a run that is given up says so in `run.done`."""
    arguments = [str(seeds(2)) if argument == "SEEDS" else argument for argument in more]
    done = streamsyn("run", "--out", tmp_path / "out", "--log-json", *NOWHERE, *arguments)

    last = events(done.stderr)[-1]
    assert code == done.returncode
    if named is None:
        assert "run.done" == last["event"]
        assert "no healthy server within 0.2 s" in last["stopped"]
    else:
        assert ("run.failed", "error") == (last["event"], last["level"])
        assert named in last["error"]


@pytest.mark.parametrize(
    ("number", "delay_s"),
    [(signal.SIGTERM, 0.05), (signal.SIGINT, 0.0), (signal.SIGUSR1, 0.15), (signal.SIGTERM, 0.3)],
)
def test_a_signal_at_the_start_ends_a_run_quietly(
    number: signal.Signals, delay_s: float, seeds: Seeds, tmp_path: Path
) -> None:
    """Before the run has begun, in the middle of its imports: exit 75, no traceback."""
    process = start("run", "--seeds", seeds(2), *NOWHERE, "--out", tmp_path / "out", "--no-progress")
    while not _catches(process.pid, signal.SIGTERM):  # from here on it is ours to answer
        assert process.poll() is None
    time.sleep(delay_s)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)

    assert 75 == process.returncode, stderr
    assert b"Traceback" not in stderr


def test_a_signal_after_the_end_changes_nothing(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """When all is written, the run is done: it says so, and exits with 0."""
    script = """
import os, signal, sys
import streamsyn.pipeline.summary
from streamsyn.cli.main import main
lines = streamsyn.pipeline.summary.closing_lines
def late(summary):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    return lines(summary)
streamsyn.pipeline.summary.closing_lines = late
main()
"""
    arguments = ["run", "--seeds", seeds(3), "--server", serve().url, "--out", tmp_path / "out"]
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)

    assert 0 == done.returncode, done.stderr
    assert "done after" in done.stderr


def test_with_log_json_a_bug_is_an_event(tmp_path: Path) -> None:
    """With its traceback inside; and so are the words of libraries."""
    script = """
import logging, warnings
import streamsyn.cli.main
import streamsyn.cli.run
def broken(*_, **__):
    logging.getLogger("library").warning("odd")
    warnings.warn("old")
    raise ZeroDivisionError("a bug")
streamsyn.cli.run.request_of = broken
streamsyn.cli.main.main()
"""
    command = [sys.executable, "-c", script, "run", "--log-json", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)

    odd, old, failed = events(done.stderr)
    assert ("odd", "library", "warning") == (odd["event"], odd["logger"], odd["level"])
    assert "UserWarning: old" in old["event"]
    assert (1, "ZeroDivisionError('a bug')") == (done.returncode, failed["error"])
    assert "Traceback" in failed["exception"]


def _catches(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("options", [(), ("--log-json",)])
def test_a_run_outlives_those_who_read_of_it(
    serve: Serve, seeds: Seeds, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """When stderr is closed at its other end, what is said is lost, and nothing else."""
    server, out = serve("--latency-ms", "300"), tmp_path / "out"
    process = start("run", "--seeds", seeds(20), "--server", server.url, "--out", out, *options)
    wait_for_line(process, "run.started")
    assert process.stderr is not None
    process.stderr.close()

    assert 0 == process.wait(30)
    assert 20 == len(rows(out, "contexts"))


def test_a_run_draws_on_a_terminal_that_goes_away(serve: Serve, seeds: Seeds, tmp_path: Path) -> None:
    """A closed pseudo-terminal answers writes with an error of its own."""
    server, out = serve("--latency-ms", "1500"), tmp_path / "out"
    ours, its = os.openpty()
    process = start("run", "--seeds", seeds(9), "--server", server.url, "--out", out, stderr=its)
    os.close(its)
    os.read(ours, 1)
    while not server.stats()["in_flight"]:
        assert process.poll() is None
    os.close(ours)

    assert 0 == process.wait(30)
    assert 9 == len(rows(out, "contexts"))


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", ">&- 2>&-"])
def test_a_run_needs_no_stderr(serve: Serve, seeds: Seeds, tmp_path: Path, closed: str) -> None:
    """Closed or full from the beginning: the outcomes are the same, and nothing gets to stdout."""
    out = tmp_path / "out"
    done = shell(f"streamsyn run --seeds {seeds(9)} --server {serve().url} --out {out} {closed}", tmp_path)

    assert (0, "") == (done.returncode, done.stdout)
    assert 9 == len(rows(out, "contexts"))
