"""What becomes of the spans of a run: requests and drafts, with times, tokens and how they ended."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from streamsyn.bench.recorder import SCORING_STEP, Recorder
from streamsyn.errors import ServerTimeout
from streamsyn.telemetry import span, traced


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recorder(clock: Clock) -> Iterator[Recorder]:
    recorder = Recorder(clock)
    with traced(recorder):
        yield recorder


@contextmanager
def draft(kind: str | None = "context", tokens: int = 30, wasted: int = 0) -> Iterator[None]:
    """A draft that becomes so, or None for one that is given up."""
    with span("draft", {"seed.id": "s", "seed.task": "qa", "draft.number": 2}) as opened:
        yield
        if kind is not None:
            opened.set(
                {
                    "outcome.kind": kind,
                    "outcome.completion_tokens": tokens,
                    "outcome.wasted_tokens": wasted,
                    **({"reject.reason": "too_short"} if kind == "reject" else {}),
                }
            )


@contextmanager
def step(number: int = 0) -> Iterator[None]:
    with span("step", {"step.number": number, "gen_ai.request.model": "m"}):
        yield


@contextmanager
def try_at(server: str, tokens: int = 10) -> Iterator[None]:
    """A try that is answered at the end of the block."""
    attributes = {"server.address": server, "gen_ai.request.model": "m", "rid": "r", "prefix.group": "g"}
    with span("request", attributes) as opened:
        yield
        opened.set(
            {
                "gen_ai.usage.input_tokens": 8,
                "gen_ai.usage.output_tokens": tokens,
                "gen_ai.usage.cached_tokens": 4,
                "gen_ai.usage.planned_cached_tokens": 6,
            }
        )


def test_the_time_of_a_request_is_split(recorder: Recorder, clock: Clock) -> None:
    """Into waiting for a place, and the server; what is between the steps is the recipe's."""
    with draft():
        clock.now += 1  # the recipe writes its prompt
        with step():
            clock.now += 2  # no server has room
            with try_at("a"):
                clock.now += 4
        clock.now += 8  # checks
        with span("journal", {"step.number": 0}):
            clock.now += 16
    (request,), (record,) = recorder.requests, recorder.drafts

    assert (1.0, 3.0, 7.0) == (request.queued_at, request.sent_at, request.done_at)
    assert (2.0, 4.0) == (request.queue_s, request.server_s)
    assert (0.0, 31.0) == (record.begun_at, record.ended_at)
    assert (9.0, 16.0) == (record.client_s, record.disk_s)
    assert ("a", "m", "g", 0, 0) == (
        request.server,
        request.model,
        request.group,
        request.draft,
        request.step,
    )
    assert (8, 4, 6, 10) == (
        request.prompt_tokens,
        request.cached_tokens,
        request.planned_cached_tokens,
        request.completion_tokens,
    )


def test_a_retry_waits_since_its_failure(recorder: Recorder, clock: Clock) -> None:
    """And the failure keeps its name."""
    with draft(), step():
        with suppress(ServerTimeout), try_at("a"):
            clock.now += 5
            raise ServerTimeout("late")
        clock.now += 1
        with try_at("b"):
            clock.now += 2
    failed, answered = recorder.requests

    assert ("error", "ServerTimeout", 0.0) == (failed.ended, failed.error, failed.useful_tokens)
    assert (5.0, 6.0, 8.0) == (answered.queued_at, answered.sent_at, answered.done_at)
    assert not answered.is_hedge


def test_a_second_try_beside_the_first_is_a_hedge(recorder: Recorder, clock: Clock) -> None:
    """It did not wait; the one that lost is aborted and not useful."""
    with draft(tokens=10), step(), suppress(asyncio.CancelledError), try_at("a"):
        clock.now += 5
        with try_at("b"):
            clock.now += 1
        raise asyncio.CancelledError
    won, lost = recorder.requests

    assert ("b", True, 0.0, "ok", 10.0) == (
        won.server,
        won.is_hedge,
        won.queue_s,
        won.ended,
        won.useful_tokens,
    )
    assert ("a", False, "aborted", 0.0) == (lost.server, lost.is_hedge, lost.ended, lost.useful_tokens)


def test_discarded_answers_share_the_useful_tokens(recorder: Recorder) -> None:
    """A context of 30 tokens from answers of 20, 10 and 20, one of which was discarded."""
    with draft(tokens=30, wasted=20):
        for tokens in (20, 10, 20):
            with step(), try_at("a", tokens):
                pass

    assert [12.0, 6.0, 12.0] == pytest.approx([request.useful_tokens for request in recorder.requests])
    assert (30, 20) == (recorder.drafts[0].useful_tokens, recorder.drafts[0].wasted_tokens)


def test_a_reject_is_not_useful_and_what_is_given_up_is_unknown(recorder: Recorder) -> None:
    """The drain gives up drafts."""
    with draft("reject", tokens=0, wasted=10), step(), try_at("a"):
        pass
    with draft(None):
        assert 1 == recorder.drafts_in_flight
        with step(), try_at("a"):
            assert 1 == recorder.requests_in_flight

    assert [0.0, None] == [request.useful_tokens for request in recorder.requests]
    assert [("reject", "too_short"), ("unfinished", "")] == [
        (record.outcome, record.reason) for record in recorder.drafts
    ]
    assert recorder.drafts[1].ended_at is None
    assert (0, 0) == (recorder.drafts_in_flight, recorder.requests_in_flight)


def test_a_request_between_steps_scores(recorder: Recorder, clock: Clock) -> None:
    """Its time is not the recipe's, and its tokens are not the context's."""
    with draft(tokens=10):
        with step(), try_at("a"):
            clock.now += 1
        with try_at("scorer", tokens=3):
            clock.now += 2
    written, scored = recorder.requests

    assert (0, SCORING_STEP) == (written.step, scored.step)
    assert (10.0, 0.0) == (written.useful_tokens, scored.useful_tokens)
    assert 0.0 == recorder.drafts[0].client_s


def test_spans_of_nothing_that_is_measured_are_ignored(recorder: Recorder) -> None:
    """A request outside of drafts, as a check before a run, and spans with other names."""
    with try_at("a"):
        pass
    with draft(), span("anything", {"a": 1}) as opened:
        opened.set({"b": 2})

    assert [] == recorder.requests
    assert {} == recorder.headers()


async def test_the_lag_of_the_event_loop_is_measured() -> None:
    """By a timer that comes late, since the loop is busy."""
    loop = asyncio.get_running_loop()
    recorder = Recorder(loop.time)
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(recorder.watch_lag(), name="lag")
        await asyncio.sleep(0)
        busy_until = loop.time() + 0.15
        while loop.time() < busy_until:
            pass
        for _ in range(3):  # the timer is due, and fires as soon as the loop is free
            await asyncio.sleep(0)
        watching.cancel()

    assert recorder.lag_s is not None
    assert recorder.lag_s >= 0.09
