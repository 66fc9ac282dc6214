"""`run_sync`: a whole run, blocking, in every kind of thread; Ctrl-C drains it."""

import asyncio
import gc
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

import streamsyn
from tests.library.conftest import Server, arguments, pairs, serving

SeedFile = Callable[[int], Path]


@pytest.fixture
def draining() -> Iterator[threading.Event]:
    """Set when a run begins to drain."""
    begun, logger = threading.Event(), logging.getLogger("streamsyn")

    class Noted(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "finishing what is in flight" in record.getMessage():
                begun.set()

    noted = Noted()
    logger.addHandler(noted)
    logger.setLevel(logging.INFO)
    yield begun
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(noted)


@contextmanager
def interrupted(server: Server, number: int, draining: threading.Event | None = None) -> Iterator[None]:
    """Send SIGINT to this process after this number of requests, and again once the run is draining.

    One that the run does not handle fails the test, and does not end the process that runs all of them.
    """

    def interrupt() -> None:
        server.until_asked(number)
        os.kill(os.getpid(), signal.SIGINT)
        if draining is not None:
            assert draining.wait(10)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, name="interrupts")
    thread.start()
    try:
        yield
        thread.join()
    except KeyboardInterrupt:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        thread.join()
        signal.signal(signal.SIGINT, before)
        pytest.fail("the run did not handle a SIGINT")


def test_ctrl_c_drains_and_the_same_call_resumes(tmp_path: Path, server: Server, seeds: SeedFile) -> None:
    """The summary says so; handlers and the garbage collector are as before."""
    given = arguments(tmp_path / "out", server)
    before = signal.getsignal(signal.SIGINT), gc.get_threshold()
    with interrupted(server, 20):
        summary = streamsyn.run_sync(seeds=seeds(200), **given)
    assert summary.stopped == "stopped by SIGINT"
    assert 20 <= summary.contexts == len(server.asked) < 200
    assert before == (signal.getsignal(signal.SIGINT), gc.get_threshold())
    assert streamsyn.run_sync(seeds=seeds(200), **given).contexts == len(server.asked) == 200


@pytest.mark.usefixtures("may_block")
async def test_in_a_running_loop_ctrl_c_drains_too(tmp_path: Path, server: Server, seeds: SeedFile) -> None:
    """As in a notebook. It blocks the loop, as its name says. All seeds would take longer than the signal."""
    with interrupted(server, 20):
        summary = streamsyn.run_sync(seeds=seeds(20_000), **arguments(tmp_path / "out", server))
    assert summary.stopped == "stopped by SIGINT"
    assert 20 <= summary.contexts < 20_000


@pytest.mark.usefixtures("may_block")
def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, seeds: SeedFile, draining: threading.Event) -> None:
    """The drain would take minutes."""
    with serving(latency_ms=100_000) as server:
        given = arguments(tmp_path / "out", server, overrides={"run.drain_timeout_s": 600})

        async def in_a_loop() -> streamsyn.RunSummary:
            return streamsyn.run_sync(seeds=seeds(9), **given)

        def alone() -> streamsyn.RunSummary:
            return asyncio.run(in_a_loop())

        for run in (alone, partial(streamsyn.run_sync, seeds=seeds(9), **given)):
            server.asked.clear()
            draining.clear()
            with interrupted(server, 1, draining):
                summary = run()
            assert (0, "stopped by SIGINT") == (summary.contexts, summary.stopped)


async def test_in_a_thread_it_handles_no_signals(tmp_path: Path, server: Server, seeds: SeedFile) -> None:
    """Only the main thread can."""
    given = arguments(tmp_path / "out", server)
    summary = await asyncio.to_thread(streamsyn.run_sync, seeds=await asyncio.to_thread(seeds, 20), **given)
    assert (20, None) == (summary.samples, summary.stopped)
    assert (20, {"contexts": 20, "rejects": 0, "samples": 20}) == (
        summary.as_dict()["samples"],
        summary.as_dict()["directory"],
    )


def test_errors_are_the_same_as_of_an_open_run(tmp_path: Path, seeds: SeedFile) -> None:
    """A setting, a fleet that is gone, an iterable that fails."""
    with serving() as server:
        given = arguments(tmp_path / "out", server, overrides={"fleet.give_up_s": 0.1})

        def failing() -> Iterator[dict[str, str]]:
            yield from pairs(3)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            streamsyn.run_sync(seeds=failing(), **given)
        with pytest.raises(streamsyn.ConfigError, match="no seeds"):
            streamsyn.run_sync(**arguments(tmp_path / "empty", server))
    with pytest.raises(streamsyn.StoppedEarly, match="no healthy server"):
        streamsyn.run_sync(seeds=seeds(3), **given)
    with pytest.raises(streamsyn.ConfigError, match=r"recipe\.use"):
        streamsyn.run_sync({"recipe": {"use": "nothing"}}, seeds=seeds(3), out=tmp_path / "out")


def test_a_library_is_quiet(
    tmp_path: Path, server: Server, seeds: SeedFile, capfd: pytest.CaptureFixture[str]
) -> None:
    """It logs to the loggers below `streamsyn`, which show warnings."""
    streamsyn.run_sync(seeds=seeds(3), **arguments(tmp_path / "out", server))
    assert capfd.readouterr() == ("", "")


def test_log_lines_are_those_of_the_standard_library(
    tmp_path: Path, server: Server, seeds: SeedFile, caplog: pytest.LogCaptureFixture
) -> None:
    """At the level that the program sets."""
    with caplog.at_level("INFO", logger="streamsyn"):
        streamsyn.run_sync(seeds=seeds(3), **arguments(tmp_path / "out", server))
    (started,) = [record for record in caplog.records if record.getMessage().startswith("run.started")]
    assert started.name.startswith("streamsyn.")
    assert "model='simulated'" in started.getMessage()
