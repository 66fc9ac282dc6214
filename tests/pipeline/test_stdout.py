"""Stdout as a stream of samples: real pipes, and readers that are slow, stuck or gone."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

PRELUDE = """
import os, subprocess, sys, threading
from streamsyn.errors import StreamsynError
from streamsyn.pipeline.stdout import SampleStream

def report(write):
    try:
        write()
    except StreamsynError as error:
        print(type(error).__name__, error, file=sys.stderr, flush=True)
    else:
        print("all written", file=sys.stderr, flush=True)
"""


def started(script: str, stdout: int | None = subprocess.PIPE) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + script],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


def test_nothing_but_samples_gets_to_stdout() -> None:
    """What is printed, by us or by others, goes to stderr; the lines come as they were written."""
    script = """
stream = SampleStream()
print("stray")
stream.write([b'{"a":1}\\n', b'{"b":2}\\n'])
os.write(1, b"low level\\n")
subprocess.run(["echo", "a child"], check=True)
sys.stdout.flush()
stream.write([b'{"c":3}\\n'])
stream.close()
"""
    with started(script) as process:
        out, err = process.communicate(timeout=20)

    assert b'{"a":1}\n{"b":2}\n{"c":3}\n' == out
    assert {b"a child", b"stray", b"low level"} == set(err.splitlines())
    assert 0 == process.returncode


def test_each_line_is_there_at_once() -> None:
    """A line is in the pipe when `write` returns: the reader need not wait for more, or for the end."""
    script = """
stream = SampleStream()
for line in sys.stdin.buffer:
    stream.write([line])
"""
    with started(script) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in (b"one\n", b"two\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert line == process.stdout.readline()
        process.stdin.close()


@pytest.mark.parametrize("size", [4095, 4096, 4097, 65_537, 5_000_000])
def test_long_lines_arrive_whole(size: int) -> None:
    """Lines longer than the pipe come out byte by byte as they went in."""
    script = f"""
stream = SampleStream()
report(lambda: stream.write(bytes([97 + n]) * {size} + b"\\n" for n in range(3)))
"""
    with started(script) as process:
        out, err = process.communicate(timeout=20)

    assert b"".join(letter * size + b"\n" for letter in (b"a", b"b", b"c")) == out
    assert b"all written\n" == err


def test_a_file_is_written_as_well(tmp_path: Path) -> None:
    """Stdout may be a file."""
    with (
        (tmp_path / "out").open("wb") as file,
        started(
            'stream = SampleStream(); report(lambda: stream.write([b"x" * 3_000_000 + b"\\n"]))',
            file.fileno(),
        ) as process,
    ):
        _, err = process.communicate(timeout=20)

    assert b"all written\n" == err
    assert b"x" * 3_000_000 + b"\n" == (tmp_path / "out").read_bytes()


def test_a_reader_that_closes_is_noticed() -> None:
    """`head -1` ends the stream with ReaderGone, not with a signal or a traceback."""
    script = """
stream = SampleStream()
report(lambda: stream.write(iter(lambda: b"x" * 1000 + b"\\n", None)))
stream.close()
"""
    with started(script) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()

    assert b"ReaderGone the reader of stdout has gone away\n" == err
    assert 0 == process.returncode


def test_stop_ends_a_write_that_nobody_reads() -> None:
    """A reader that is stuck keeps `write` waiting until `stop` is called; later ones end at once."""
    script = """
stream = SampleStream()
writing = threading.Thread(target=report, args=[lambda: stream.write([b"x" * 10_000_000])])
writing.start()
sys.stdin.readline()
stream.stop()
writing.join()
report(lambda: stream.write([b"more\\n"]))
"""
    with started(script) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(1)  # the write has begun, and the pipe cannot hold all of it
        process.stdin.write(b"stop\n")
        process.stdin.flush()
        err = process.stderr.read()
        process.stdout.read()

    assert b"x" == first
    assert b"ReaderGone stopped while the reader of stdout was not reading\n" * 2 == err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_behind_stdout_is_one_clear_line() -> None:
    """Stdout that cannot be written is not a bug: a SinkError with the reason."""
    with (
        Path("/dev/full").open("wb") as full,
        started('stream = SampleStream(); report(lambda: stream.write([b"x\\n"]))', full.fileno()) as process,
    ):
        _, err = process.communicate(timeout=20)

    assert b"SinkError cannot write samples to stdout: No space left on device\n" == err


RESUMING = """
stream = SampleStream()
marker = Path(sys.argv[1])
def lines():
    for line in sys.stdin.buffer:
        yield json.dumps({"id": int(line), "text": "x" * 50_000}).encode() + b"\\n"
        print("written", file=sys.stderr, flush=True)
def write():
    stream.resume(marker)
    stream.write(lines())
report(write)
stream.leave()
"""


def readable(stream: bytes) -> set[int]:
    """The ids of the samples that a reader finds which skips what it cannot read."""
    found = set()
    for line in stream.splitlines():
        with suppress(ValueError):
            found.add(json.loads(line)["id"])
    return found


def resuming(marker: Path, stdout: int, **options: Any) -> subprocess.Popen[bytes]:
    """A process that writes a sample for each number on its stdin, onto a stream that outlives it."""
    script = "import json, resource\nfrom pathlib import Path\n" + PRELUDE + RESUMING
    command = [sys.executable, "-c", script, str(marker)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=stdout, stderr=pipe, **options)


def test_a_run_on_the_pipe_of_one_that_was_killed_loses_nothing(tmp_path: Path) -> None:
    """Samples that do not fit in the pipe, and three kills: the next run writes the torn one whole."""
    read, write = os.pipe()
    received, written = b"", 0
    for is_last in (False, False, False, True):
        with resuming(tmp_path / "marker", write) as process:
            assert process.stdin is not None
            assert process.stderr is not None
            process.stdin.write(b"".join(b"%d\n" % number for number in range(written, 10)))
            process.stdin.close()
            if is_last:
                os.close(write)
            end = len(received) + (10**9 if is_last else 70_000)
            while len(received) < end and (chunk := os.read(read, 4096)):
                received += chunk
            if not is_last:
                process.stderr.readline()
                time.sleep(0.2)  # until the pipe is full
                process.kill()
                written += 1
            written += process.stderr.read().count(b"written\n")
    os.close(read)

    assert set(range(10)) == readable(received)
    assert not (tmp_path / "marker").exists()


def test_a_run_on_a_file_that_ends_in_a_torn_line_loses_nothing(tmp_path: Path) -> None:
    """As a full disk leaves it, with and without the marker; whole files get no empty line."""
    path, marker = tmp_path / "samples.jsonl", tmp_path / "marker"
    path.write_bytes(b'{"id": 0}\n{"id": 1, "te')
    for _ in range(2):
        with path.open("ab") as file, resuming(marker, file.fileno()) as process:
            process.communicate(b"1\n")

    assert {0, 1} == readable(path.read_bytes())
    assert 4 == len(path.read_bytes().splitlines())


def test_a_closed_stdout_is_refused() -> None:
    """Its number may belong to a different file when samples come."""
    script = PRELUDE + "report(SampleStream)"
    command = ["bash", "-c", '"$0" -c "$1" >&-', sys.executable, script]
    done = subprocess.run(command, stderr=subprocess.PIPE, timeout=20, check=False)

    assert b"ConfigError --stdout prints samples, and stdout is closed\n" == done.stderr


def test_a_secured_stderr_never_fails() -> None:
    """Even when nobody reads it: what is written is lost, and the exit code does not change."""
    script = (
        PRELUDE
        + """
from streamsyn.pipeline.stdout import secure_stdio
secure_stdio()
print("one", file=sys.stderr)
sys.stdin.readline()
print("two" * 100_000, file=sys.stderr)
print("three", file=sys.stderr, flush=True)
"""
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        first = process.stderr.readline()
        process.stderr.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert 0 == process.wait(20)

    assert b"one\n" == first
