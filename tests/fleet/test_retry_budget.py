"""Pauses between tries, and when a request gives up."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.config.sections import FleetSection
from streamsyn.errors import (
    BrokenResponse,
    RateLimited,
    RequestRefused,
    ServerBusy,
    ServerError,
    ServerTimeout,
    ServerUnavailable,
    ServerUnreachable,
)
from streamsyn.fleet.health import RetryBudget, full_jitter

TRIES = [BrokenResponse, ServerTimeout, ServerUnavailable]
FREE = [ServerBusy, ServerUnreachable]


def budget(**fleet: float) -> RetryBudget:
    """A budget under a configuration with `fleet` changed."""
    return RetryBudget(FleetSection.model_validate(fleet), Random(1))


@given(
    base_s=st.floats(0.001, 10), longest_s=st.floats(0.001, 100), step=st.integers(0, 60), seed=st.integers()
)
def test_pauses_are_bounded(base_s: float, longest_s: float, step: int, seed: int) -> None:
    """A pause is between zero and the base doubled at each step, at most the longest."""
    pause_s = full_jitter(base_s, longest_s, step, Random(seed))
    assert 0 <= pause_s <= min(longest_s, base_s * 2**step)
    assert 0 <= full_jitter(base_s, longest_s, 10**6, Random(seed)) <= longest_s


def test_pauses_spread_over_the_whole_range() -> None:
    """Full jitter: requests that failed together are not retried together."""
    rng = Random(0)
    pauses = [full_jitter(1.0, 30.0, 3, rng) for _ in range(1000)]
    assert [True] * 8 == [any(low <= pause < low + 1 for pause in pauses) for low in range(8)]


@pytest.mark.parametrize("kind", TRIES)
def test_tries_are_bounded(kind: type[ServerError]) -> None:
    """After `fleet.max_attempts` tries a request gives up."""
    spent = budget(max_attempts=3, backoff_base_s=0.5)
    pauses = [spent.pause_after(kind("x"), 0.1) for _ in range(3)]
    assert [False, False, True] == [pause is None for pause in pauses]


@pytest.mark.parametrize("kind", FREE)
def test_requests_that_were_not_accepted_cost_no_try(kind: type[ServerError]) -> None:
    """A full queue and an unreachable server cost no try, however often they happen."""
    spent = budget(max_attempts=1)
    assert [0.0] * 1000 == [spent.pause_after(kind("x"), 0.001) for _ in range(1000)]
    assert 0 == spent.tries


def test_a_refused_request_is_given_up_at_once() -> None:
    """A retry cannot help."""
    assert budget().pause_after(RequestRefused("x"), 0.1) is None


def test_seconds_are_bounded() -> None:
    """A request gives up after `fleet.total_timeout_s`, however few its tries."""
    spent = budget(max_attempts=100, total_timeout_s=10, backoff_base_s=0.001)
    pauses = [spent.pause_after(ServerTimeout("x"), 4.0) for _ in range(3)]
    assert [False, False, True] == [pause is None for pause in pauses]


EVENT = st.tuples(st.sampled_from([*TRIES, *FREE]), st.floats(0, 5))


@given(
    events=st.lists(EVENT, max_size=60),
    max_attempts=st.integers(1, 8),
    total_s=st.floats(0.1, 60),
    seed=st.integers(),
)
def test_a_budget_is_never_overdrawn(
    events: list[tuple[type[ServerError], float]], max_attempts: int, total_s: float, seed: int
) -> None:
    """While it says to go on, fewer tries than the most were made and less time was spent."""
    section = FleetSection(max_attempts=max_attempts, total_timeout_s=total_s)
    spent, tries, seconds = RetryBudget(section, Random(seed)), 0, 0.0
    for kind, took_s in events:
        pause_s = spent.pause_after(kind("x"), took_s)
        tries += kind in TRIES
        if pause_s is None:
            assert tries == max_attempts or seconds + took_s + section.backoff_max_s >= total_s
            return
        seconds += took_s + pause_s
        assert tries < max_attempts
        assert kind in FREE or seconds < total_s + 1e-6
        assert pause_s <= section.backoff_max_s


def test_a_request_with_a_limit_of_its_own_gives_up() -> None:
    """It is refused while others are answered; then it has `give_up_s`, whatever the pauses."""
    spent = budget(give_up_s=100.0, backoff_base_s=1.0)
    pauses = []
    for number in range(40):
        spent.rate_limited(10.0 * number, answers=number, others_are=False)
        pauses.append(spent.pause_after(RateLimited("x"), 0.1))
        assert (number >= 3) is spent.has_own_limit
    assert [False] * 11 + [True] * 29 == [pause is None for pause in pauses]
    assert 0 == spent.tries


def test_an_outage_is_nobodys_own_limit() -> None:
    """While all requests are refused, none gives up."""
    spent = budget(give_up_s=100.0, backoff_max_s=30.0)
    for number in range(40):
        spent.rate_limited(100.0 * number, answers=7, others_are=True)
        pause_s = spent.pause_after(RateLimited("x"), 0.1)
        assert pause_s is not None
        assert pause_s <= 30
        assert not spent.has_own_limit


def test_the_pause_that_a_server_asks_for() -> None:
    """All requests wait for the server together; one with a limit of its own waits by itself."""
    spent = budget()
    spent.rate_limited(0.0, answers=0, others_are=False)
    assert 0.0 == spent.pause_after(RateLimited("x", retry_after_s=7.0), 0.1)
    for number in range(1, 4):
        spent.rate_limited(float(number), answers=number, others_are=False)
    assert 7.0 == spent.pause_after(RateLimited("x", retry_after_s=7.0), 0.1)
