"""Coordinators: run, started again when they die, drained, and what is recorded of their ends."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from math import inf
from pathlib import Path

import pytest
import structlog
from click.testing import CliRunner

from streamsyn.cli.main import cli
from streamsyn.cli.partitioned_run import _own_settings
from streamsyn.config.loading import load, parse_override
from streamsyn.errors import ConfigError, SinkError
from streamsyn.fleet.discovery import Demand
from streamsyn.pipeline import coordinator_process
from streamsyn.pipeline.coordinator_process import started_here
from streamsyn.pipeline.coordinators import Coordinator, Coordinators, RestartLimit
from streamsyn.sink.partitions import begin_partitions, read_partitions
from streamsyn.sink.rundir import RunDirectory
from tests.builders import new_run, opened, sink

DONE = (
    """print('{"event": "run.done", "level": "info", "contexts": 2, "directory": {"contexts": 5}}', file=e)"""
)


def python(code: str) -> list[str]:
    """The command line of a coordinator that is a small program."""
    return [sys.executable, "-I", "-S", "-c", f"import os, sys, signal; e = sys.stderr; {code}"]


def finished(root: Path, number: int) -> None:
    """Partitions that the programs of these tests seem to have written."""
    for directory in begin_partitions(root, number).directories:
        with opened(new_run(directory), sink()) as log:
            log.finish()


def ran(root: Path, *codes: str) -> tuple[Coordinators, int]:
    """Run a program for each partition to its end."""
    commands = [python(code) for code in codes]
    coordinators = Coordinators(
        begin_partitions(root, len(codes)), started_here(lambda at: commands[at]), as_json=False
    )
    return coordinators, asyncio.run(coordinators.run())


def test_partitions_that_end_are_recorded(tmp_path: Path) -> None:
    """With the sum of their summaries. The next run takes them up in a new round."""
    finished(tmp_path, 2)
    done, code = ran(tmp_path, DONE, f"{DONE}; sys.exit(3)")

    assert (3, True) == (code, done.partitions.has_ended)
    assert (4, 10) == (done.total("contexts"), done.total("directory", "contexts"))
    done, code = ran(tmp_path, DONE, DONE)
    assert 0 == code
    assert 1 == len(done.partitions.rounds)


def test_a_partition_that_had_ended_waits_for_the_others(tmp_path: Path) -> None:
    """It is taken up, for new seeds, when all have ended; not at all if they have not."""
    finished(tmp_path, 2)
    begin_partitions(tmp_path, 2).with_ended(0)
    note = f"open({str(tmp_path / 'order')!r}, 'a').write"

    _, code = ran(tmp_path, f"{note}('0')", f"{note}('1'); sys.exit(75)")
    assert (75, "1") == (code, (tmp_path / "order").read_text())
    done, code = ran(tmp_path, f"{note}('0')", f"{note}('1')")
    assert (0, "110") == (code, (tmp_path / "order").read_text())
    assert done.partitions.has_ended
    assert read_partitions(tmp_path) == done.partitions


def test_a_coordinator_that_dies_is_started_again(tmp_path: Path) -> None:
    """What it logged is passed on with its partition; its end is that of the last start."""
    finished(tmp_path, 1)
    mark = tmp_path / "mark"
    dies = f"os.kill(os.getpid(), signal.SIGKILL) if not os.path.exists({str(mark)!r}) else None"
    warns = """print('{"event": "server.ejected", "level": "warning", "url": "http://gpu-1"}', file=e)"""
    command = python(f"{warns}; new = {dies}")

    def next_command(_: int) -> Sequence[str]:
        if started:
            mark.touch()
        started.append(True)
        return command

    started: list[bool] = []
    coordinators = Coordinators(begin_partitions(tmp_path, 1), started_here(next_command), as_json=False)
    coordinators.each[0].restarts = RestartLimit(pause_s=0.0)
    with structlog.testing.capture_logs() as logged:
        code = asyncio.run(coordinators.run())

    assert (0, 2) == (code, len(started))
    [restart] = [one for one in logged if one["event"] == "coordinator.restarts"]
    assert ("signal 9", 0) == (restart["because"], restart["partition"])
    ejected = [one for one in logged if one["event"] == "server.ejected"]
    assert [("http://gpu-1", 0, "warning")] * 2 == [
        (one["url"], one["partition"], one["log_level"]) for one in ejected
    ]


def test_a_refused_coordinator_drains_the_others(tmp_path: Path) -> None:
    """A mistake in the configuration is that of all."""
    finished(tmp_path, 2)
    fails = """print('{"event": "run.failed", "level": "error", "error": "no seeds"}', file=e); sys.exit(2)"""
    drains = "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); signal.pause()"
    waits = f"signal.pthread_sigmask(signal.SIG_BLOCK, [10]); signal.sigwait([10]); sys.exit(75); {drains}"
    done, code = ran(tmp_path, fails, waits)

    assert (2, [2, 75]) == (code, [one.code for one in done.each])
    assert "no seeds" == done.each[0].error
    assert {} == done.partitions.ended


def test_a_signal_drains_all(tmp_path: Path) -> None:
    """It is passed on, as one that never ends a run at once; none is started again.

    What a terminal, a job or a service sends to all processes does not count twice: coordinators are in
    groups of their own, and a SIGTERM that they got as well is the first signal that they heed.
    """
    finished(tmp_path, 2)
    waits = (
        "signal.pthread_sigmask(signal.SIG_BLOCK, [10]); os.getpgid(0) == os.getpid() or sys.exit(1); "
        f"os.kill({os.getpid()}, 15); signal.sigwait([signal.SIGUSR1]); sys.exit(75)"
    )
    before = signal.getsignal(signal.SIGTERM)
    try:
        done, code = ran(tmp_path, waits, waits)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert (75, [75, 75]) == (code, [one.code for one in done.each])
    assert done.interrupted


def test_a_signal_ends_the_wait_for_an_earlier_coordinator(tmp_path: Path) -> None:
    """One that is stuck may hold its lock for good; nothing is started any more."""
    finished(tmp_path, 1)
    held = RunDirectory(tmp_path / "partition-000")
    coordinators = Coordinators(
        begin_partitions(tmp_path, 1), started_here(lambda _: python("sys.exit(0)")), as_json=False
    )
    before = signal.getsignal(signal.SIGTERM)
    real = coordinators._until_free

    async def signalled(one: Coordinator) -> None:
        asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGTERM)
        await real(one)

    coordinators._until_free = signalled  # type: ignore[method-assign]
    try:
        with structlog.testing.capture_logs() as logged:
            code = asyncio.run(coordinators.run())
    finally:
        signal.signal(signal.SIGTERM, before)
        held.close()

    assert 75 == code
    assert "coordinator.started" not in [one["event"] for one in logged]


def test_a_coordinator_that_a_signal_ends_before_it_could_heed_it_has_stopped(tmp_path: Path) -> None:
    """It is not one that died: no warning, no restart."""
    finished(tmp_path, 1)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with structlog.testing.capture_logs() as logged:
            done, code = ran(tmp_path, f"os.kill({os.getpid()}, 15); signal.pause()")
    finally:
        signal.signal(signal.SIGTERM, before)

    assert (75, [75]) == (code, [one.code for one in done.each])
    assert "coordinator.restarts" not in [one["event"] for one in logged]


def test_partitions_json_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is one line of the command, and exit code 1."""
    finished(tmp_path, 1)
    (tmp_path / "partitions.json.new").mkdir()
    monkeypatch.setattr(coordinator_process, "command_here", lambda *_: python("sys.exit(0)"))
    command = ["run", "--seeds", "x.jsonl", "--server", "http://localhost:1", "--out", str(tmp_path)]

    result = CliRunner().invoke(cli, command)
    assert isinstance(result.exception, SinkError)
    assert f"cannot write {tmp_path / 'partitions.json'}: Is a directory" == str(result.exception)


def test_a_damaged_partition_costs_no_other(tmp_path: Path) -> None:
    """Its coordinator is given up as one that cannot start; the others go on to their ends."""
    finished(tmp_path, 2)
    (tmp_path / "partition-000" / "manifest.jsonl").write_text("{}\n{}\n")
    commands = [python("sys.exit(1)"), python("sys.exit(0)")]
    coordinators = Coordinators(
        begin_partitions(tmp_path, 2), started_here(lambda at: commands[at]), as_json=False
    )
    coordinators.each[0].restarts = RestartLimit(most=1, pause_s=0.0)

    assert 1 == asyncio.run(coordinators.run())
    assert {1} == coordinators.partitions.ended.keys()


def test_a_signal_before_there_are_servers(tmp_path: Path) -> None:
    """No coordinator starts."""

    async def never_ready() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    launch = started_here(lambda _: python("sys.exit(3)"))
    coordinators = Coordinators(begin_partitions(tmp_path, 2), launch, as_json=False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        code = asyncio.run(coordinators.run(never_ready))
    finally:
        signal.signal(signal.SIGTERM, before)

    assert (75, [75, 75]) == (code, [one.code for one in coordinators.each])


def test_what_all_coordinators_have_to_do(tmp_path: Path) -> None:
    """The sum over those that are at work: a server takes the requests of each."""
    coordinators = Coordinators(begin_partitions(tmp_path, 4), started_here(lambda _: []), as_json=False)
    first, second, ended, _ = coordinators.each
    first.figures = {"total": 10, "done": 4, "caps": {"a": 4, "b": 2}, "in_flight": {"a": 3, "b": 2}}
    second.figures = {"total": 7, "done": 6, "caps": {"a": 4, "b": 2}, "in_flight": {"a": 1}}
    ended.figures, ended.code = {"total": 9, "done": 8, "caps": {"a": 4}, "in_flight": {"a": 1}}, 0

    assert Demand(7, 6.0, {"a": 4, "b": 2}) == coordinators.demand()
    second.figures["total"] = None
    assert inf == coordinators.demand().left


def test_deaths_without_an_outcome_in_between_are_limited() -> None:
    """Each pause is twice the one before; an outcome begins anew."""
    limit = RestartLimit(most=3)

    assert [1.0, 2.0, 4.0, None] == [limit.after(100) for _ in range(4)]
    assert 1.0 == limit.after(101)
    many = RestartLimit(most=20)
    assert 60.0 == [many.after(0) for _ in range(10)][-1]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--stdout"], "cannot be combined with --stdout: follow the run beside it"),
        (["--train", "train.toml"], "cannot be combined with --train: train beside it"),
        (["--launch", "model"], "cannot be combined with --launch: start the server first"),
        (["--seeds", "-"], "write those of stdin to a file first"),
        (["--set", "fleet.concurency=3"], "unknown key fleet.concurency"),
    ],
)
def test_what_several_coordinators_cannot_do_is_refused(more: list[str], why: str, tmp_path: Path) -> None:
    """Before anything is written, with what to do instead."""
    out = tmp_path / "out"
    result = CliRunner().invoke(cli, ["run", "--out", str(out), "--partitions", "2", *more])

    assert isinstance(result.exception, ConfigError)
    assert why in str(result.exception)
    assert not out.exists()


def test_each_coordinator_gets_its_share() -> None:
    """Of fixed numbers of requests; and a mirror and a port of its own. What is `auto` stays so."""
    config = load(
        None,
        [
            ("fleet.concurrency", "auto"),
            ("fleet.max_in_flight", 7),
            ("sink.mirror", "s3://bucket/run/"),
            ("run.metrics_listen", "127.0.0.1:9400"),
        ],
    )
    settings = [
        [parse_override(text) for text in _own_settings(config, at, 3) if text != "--set"] for at in range(3)
    ]

    assert ["0/3", "1/3", "2/3"] == [dict(one)["seeds.partition"] for one in settings]
    assert [3, 2, 2] == [dict(one)["fleet.max_in_flight"] for one in settings]
    assert all("fleet.concurrency" not in dict(one) for one in settings)
    assert "s3://bucket/run/partition-001" == dict(settings[1])["sink.mirror"]
    assert "127.0.0.1:9402" == dict(settings[2])["run.metrics_listen"]
    assert [("seeds.partition", "0/2")] == [
        parse_override(text) for text in _own_settings(load(None, []), 0, 2) if text != "--set"
    ]
