"""`streamsyn simulate` as a process."""

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from streamsyn.cli.simulate import simulate
from tests.examples import in_turn

RUN = "from streamsyn.cli.simulate import simulate; simulate()"


@contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command with `options` on a free port, and its first line on stderr."""
    command = [sys.executable, "-c", RUN, "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None
        try:
            yield started, started.stderr.readline()
        finally:
            started.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0(number: signal.Signals) -> None:
    """It prints one line when it listens, serves, and exits 0 on SIGTERM and SIGINT."""
    with process("--model", "small") as (started, line):
        url = line.split()[3]
        assert line == f"simulating SGLang at {url} (model small)\n"
        assert urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
        os.kill(started.pid, number)
        out, err = started.communicate(timeout=10)
    assert (started.returncode, out, err) == (0, "", "")


def test_die_after_ends_the_process_without_an_answer() -> None:
    """The request after the last one kills the process as SIGKILL would."""
    with process("--die-after", "0") as (started, line):
        request = urllib.request.Request(f"{line.split()[3]}/generate", data=b'{"text": "a"}', method="POST")
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            urllib.request.urlopen(request, timeout=5)
        assert started.wait(timeout=10) == 137


@in_turn(
    ("options", "named"),
    [
        (["--fault", "flood=0.1"], "unknown fault 'flood'"),
        (["--fault", "reset=2"], "'reset' must be between 0 and 1"),
        (["--fault", "reset"], "expected KIND=RATE"),
        (["--fault", "reset=often"], "'often'"),
        (["--slots", "0"], "slots must be at least 1"),
        (["--cost-model", "tpu"], "unknown cost_model 'tpu'"),
        (["--cost-model", "cpu", "--ms-per-token", "3"], "ms_per_token has no effect"),
        (["--schedule-policy", "lpm"], "schedule_policy has no effect"),
        (["--speed", "-1"], "speed must be positive"),
    ],
)
def test_wrong_options_are_named(options: list[str], named: str) -> None:
    """A wrong option is a usage error, exit 2."""
    result = CliRunner().invoke(simulate, options)
    assert result.exit_code == 2
    assert named in result.output


def test_a_taken_port_is_a_usage_error() -> None:
    """The message names the address."""
    with process() as (_, line):
        port = line.split()[3].rpartition(":")[2]
        result = CliRunner().invoke(simulate, ["--port", port])
    assert result.exit_code == 2
    assert f"cannot listen at 127.0.0.1:{port}" in result.output


def test_help_lists_the_faults_and_imports_no_aiohttp() -> None:
    """`--help` is documentation, and fast."""
    code = f"import sys\ntry:\n    {RUN}\nfinally:\n    assert 'aiohttp' not in sys.modules"
    helped = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    )
    assert "cut_body" in helped.stdout
