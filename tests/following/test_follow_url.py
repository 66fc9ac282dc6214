"""`follow` on a run at a daemon; `RunServer` stands for it."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import structlog

from streamsyn.errors import ConfigError, RunReplaced, ServerError
from streamsyn.following import daemon_client
from streamsyn.following.daemon_client import MAX_LINE_BYTES, run_url
from streamsyn.following.follow import follow
from tests.examples import in_turn
from tests.following.run_server import RunServer, in_thread, row
from tests.following.test_follow import BOTH, read_sync


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries again at once."""
    monkeypatch.setattr(daemon_client, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("streamsyn.following.follow._LOOK_EVERY_S", 0.01)


@pytest.fixture
def server() -> Iterator[RunServer]:
    """A server in a thread of its own."""
    with in_thread(RunServer()) as serving:
        yield serving


@BOTH
def test_a_live_run_is_followed_to_its_end(read: Callable[[Any], list[int]], server: RunServer) -> None:
    """Whatever is written while it is read, over one connection; a later one begins behind `after`."""
    server.write(5)
    writer = threading.Thread(target=server.write, args=[10], kwargs={"state": "finished"})
    follower = follow(server.url)
    assert 0 == next(follower)["seq"]
    writer.start()
    seqs = read(follower)
    writer.join()

    assert list(range(1, 15)) == seqs
    assert [0] == server.firsts
    assert 1.0 == follower.run
    assert [row(14)] == list(follow(server.url + "/samples/", after=13))
    assert [] == read(follow(server.url, after=14))


def test_a_lost_connection_is_made_again_behind_the_last_row(server: RunServer) -> None:
    """No row is lost or doubled, not even one that was half sent; it is logged."""
    server.set(lose_after=[3, 0, 2, 0])
    server.write(9, state="finished")
    with structlog.testing.capture_logs() as logged:
        assert list(range(9)) == read_sync(follow(server.url))

    assert 5 == len(server.firsts)
    assert {"follow.interrupted"} == {line["event"] for line in logged}


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_daemon_that_is_busy_or_ill_is_asked_again(status: int, server: RunServer) -> None:
    """Its answer is not the end of the rows."""
    server.set(refuse=[status] * 3)
    server.write(2, state="finished")

    assert [0, 1] == read_sync(follow(server.url))


def test_a_daemon_that_stays_away_is_given_up(server: RunServer) -> None:
    """After `retry_s`, with the reason; `after` would continue."""
    server.write(2)
    follower = follow(server.url, retry_s=0.0)
    assert [0, 1] == [one["seq"] for one in islice(follower, 2)]
    server.set(refuse=[500] * 9, lose_after=[0])
    server.set(state="finished")

    with pytest.raises(ServerError, match="answered 500: not now"):
        list(follower)
    with pytest.raises(ServerError, match=r"cannot connect to http://127\.0\.0\.1:1/"):
        list(follow("http://127.0.0.1:1/v1/runs/one", retry_s=0.0))


def test_a_missing_run_is_an_error_unless_it_is_waited_for(server: RunServer) -> None:
    """With `wait`, until it is there; once it was there, its end is an error."""
    server.set(refuse=[404, 404])
    server.write(2, state="finished")
    assert [0, 1] == read_sync(follow(server.url, wait=True))
    server.set(refuse=[404])

    with pytest.raises(ConfigError, match=r"/v1/runs/one/samples does not exist: not now"):
        list(follow(server.url))
    server.set(state="running")
    follower = follow(server.url, after=0, wait=True)
    assert 1 == next(follower)["seq"]
    server.set(refuse=[404], state="finished")
    with pytest.raises(ConfigError, match="does not exist"):
        list(follower)


def test_the_token_is_sent_and_never_shown(server: RunServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes from an argument or the environment."""
    server.set(token="open sesame")
    server.write(1, state="finished")
    monkeypatch.setenv("STREAMSYN_TOKEN", "wrong one")

    with pytest.raises(ConfigError, match=r"refuses access \(401\): unknown token; give a token") as caught:
        list(follow(server.url))
    assert "wrong" not in str(caught.value)
    assert [0] == read_sync(follow(server.url, token="open sesame"))
    monkeypatch.setenv("STREAMSYN_TOKEN", "open sesame")
    assert [0] == read_sync(follow(server.url))


def test_a_run_in_the_place_of_another_is_followed_from_its_first_row(server: RunServer) -> None:
    """Also when it is replaced while the connection is lost, or by an earlier process's knowledge."""
    server.write(4)
    follower = follow(server.url)
    assert [0, 1, 2, 3] == [one["seq"] for one in islice(follower, 4)]
    server.set(created_at=2.0, rows=[row(at) for at in range(6)], state="finished")

    assert list(range(6)) == read_sync(follower)
    assert 2.0 == follower.run
    assert list(range(6)) == read_sync(follow(server.url, after=3, run=1.0))
    assert [4, 5] == read_sync(follow(server.url, after=3, run=2.0))
    with pytest.raises(RunReplaced, match="is now a different run"):
        list(follow(server.url, after=3, run=1.0, on_replaced="raise"))


def test_a_position_behind_the_end_is_refused(server: RunServer) -> None:
    """It can only belong to a different run."""
    server.write(2, state="finished")

    with pytest.raises(ConfigError, match="has ended with 2 rows, but `after` is 7"):
        list(follow(server.url, after=7))


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        ({"seq": 3}, "sent row 3 in the place of row 0"),
        ([1], "did not answer with a JSON object; is it"),
        ({"seq": 0, "text": "x" * 2000}, "sent a row of more than 1000 bytes"),
    ],
)
def test_odd_rows_are_not_taken(
    sent: Any, why: str, server: RunServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy's page or a row too long is no row."""
    monkeypatch.setattr("streamsyn.following.daemon_client.MAX_LINE_BYTES", 1000)
    server.set(rows=[sent], state="finished")

    assert MAX_LINE_BYTES > 2**20
    with pytest.raises(ServerError, match=why):
        list(follow(server.url, retry_s=0.0))


@in_turn(
    ("url", "why"),
    [
        ("http://host/v1/run/one", "is not the URL of a run: expected"),
        ("http://host/v1/runs/", "is not the URL of a run"),
        ("ftp://host/v1/runs/one", "is not the URL of a run"),
        ("http://host/v1/runs/one?after=3", "is not the URL of a run"),
        ("http://me:secret@host/v1/runs/one", "http://host/v1/runs/one: a URL must not hold credentials"),
    ],
)
def test_a_wrong_url_is_refused(url: str, why: str) -> None:
    """At once, and without its password."""
    with pytest.raises(ConfigError, match=why) as caught:
        follow(url)
    assert "secret" not in str(caught.value)


def test_the_url_may_name_the_kind() -> None:
    """A different `kind` beside it is a mistake; a daemon may lie behind a prefix."""
    assert ("https://host/at/v1/runs/one", "contexts") == run_url("https://host/at/v1/runs/one/contexts")
    with pytest.raises(ConfigError, match="kind='samples': expected contexts"):
        follow("https://host/v1/runs/one/contexts", kind="samples")


@pytest.fixture
def nothing_left(server: RunServer) -> Iterator[None]:
    """Fails if the test leaves threads or open files."""
    gc.collect()
    before = {*threading.enumerate()}, sorted(Path("/proc/self/fd").iterdir())
    yield
    gc.collect()
    assert before == ({*threading.enumerate()}, sorted(Path("/proc/self/fd").iterdir()))


def test_breaking_out_leaves_nothing_open(server: RunServer, nothing_left: None) -> None:
    """No thread, no connection; the server is told."""
    server.write(5)
    for one in follow(server.url):
        if one["seq"] == 3:
            break
    with follow(server.url) as follower:
        next(follower)
    follow(server.url).close()

    assert [] == list(follower)


@pytest.fixture
async def served() -> AsyncIterator[RunServer]:
    """A server in the loop of the test."""
    server = RunServer()
    async with server.serving():
        yield server


async def test_a_wait_that_was_cancelled_loses_no_row(served: RunServer) -> None:
    """The next call goes on where the last row was."""
    served.write(2)
    async with follow(served.url) as follower:
        seqs = [(await anext(follower))["seq"] for _ in range(2)]
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await anext(follower)
        served.write(3, state="finished")
        seqs += [one["seq"] async for one in follower]

    assert list(range(5)) == seqs


async def test_leaving_early_ends_the_stream(served: RunServer) -> None:
    """The daemon sends nothing more to a follower that is gone."""
    served.write(3)
    async for one in follow(served.url):
        if one["seq"] == 1:
            break
    async with asyncio.timeout(5):
        while served.open_streams:
            served.set()
            await asyncio.sleep(0)
