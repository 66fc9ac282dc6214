"""Our section of the report, from measurements made by hand."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.bench.figures import figures, tokens_over_time
from streamsyn.bench.measurement import Interval, Measurement, ServerCounters
from tests.bench.measured import SERVERS, measurement, request, steady_requests, tick
from tests.examples import examples

times = st.floats(0.0, 40.0, allow_nan=False)
answers = st.builds(
    lambda begin, lasted, tokens: request(sent_at=begin, done_at=begin + lasted, completion_tokens=tokens),
    times,
    st.floats(0.0, 20.0),
    st.integers(0, 5000),
)


def test_useful_tokens_are_those_of_contexts() -> None:
    """Tokens of rejects, of answers asked again, of hedges and of aborted requests are deducted."""
    requests = [
        request(0, 10.0, 20.0),
        request(1, 10.0, 20.0, useful_tokens=0.0),
        request(2, 10.0, 20.0, useful_tokens=0.0),
        request(2, 19.0, 29.0),
        request(3, 10.0, 20.0, ended="aborted", useful_tokens=0.0, completion_tokens=0),
        request(3, 15.0, 25.0, is_hedge=True),
        request(4, 15.0, 25.0, ended="aborted", useful_tokens=0.0, completion_tokens=0),
        request(5, 20.0, 30.0, ended="error", error="ServerBusy", completion_tokens=0, useful_tokens=0.0),
    ]

    found = figures(measurement(requests, outcomes={1: "reject", 4: "reject", 5: "reject"}))

    assert pytest.approx(600 / 20) == found.useful_tokens_per_s
    assert pytest.approx(600 / 20 / 2) == found.useful_tokens_per_s_per_gpu
    assert {"rejects": 10.0, "retries": 10.0, "hedges": 10.0, "aborted": 10.0} == pytest.approx(
        found.deducted_tokens_per_s
    )
    assert pytest.approx(1400 / 20) == found.written_tokens_per_s
    assert {"context": 3, "too_short": 2} == found.outcomes


def test_what_the_drain_gave_up_is_not_deducted() -> None:
    """Drafts that were in flight at the end are as useful as the others were; half of these were rejects."""
    requests = [
        request(0, 10.0, 20.0),
        request(1, 10.0, 20.0, useful_tokens=0.0),
        request(2, 20.0, 30.0, useful_tokens=None),
        request(3, 25.0, 35.0, ended="aborted", useful_tokens=None, completion_tokens=0),
    ]

    found = figures(measurement(requests, outcomes={1: "reject", 2: "unfinished", 3: "unfinished"}))

    assert pytest.approx(350 / 20) == found.useful_tokens_per_s
    assert pytest.approx(350 / 20) == found.deducted_tokens_per_s["rejects"]


def test_a_wave_of_answers_just_outside_the_window_counts_by_its_share() -> None:
    """What was written within the window counts, whenever its answer was complete."""
    before, after = request(0, 5.0, 15.0), request(1, 25.0, 35.0)

    found = figures(measurement([before, after]))

    assert pytest.approx(200 / 20) == found.useful_tokens_per_s


@examples(100)
@given(st.lists(answers, max_size=8), st.lists(times, min_size=1, max_size=6, unique=True))
def test_no_token_is_lost_over_time(requests: list[Any], edges: list[float]) -> None:
    """However time is cut, all tokens are counted once."""
    cuts = [0.0, *sorted(edges), 1000.0]

    written = tokens_over_time(requests, cuts)

    assert len(cuts) - 1 == len(written)
    assert all(tokens >= -1e-6 for tokens in written)
    assert pytest.approx(sum(one.completion_tokens for one in requests)) == sum(written)


def test_prefix_tokens_planned_achieved_and_lost() -> None:
    """A plan that one request did not get is lost, even where another one got more than planned."""
    found = figures(
        measurement(
            [request(0), request(1, cached_tokens=0), request(2, cached_tokens=90, cached_host_tokens=40)]
        )
    ).prefix_tokens

    assert (300, 180, 150, 150, 60) == (
        found.prompt,
        found.planned,
        found.achieved,
        found.computed,
        found.lost,
    )
    assert (40, 0) == (found.from_host, found.from_storage)
    assert pytest.approx(2 / 3) == found.kept_share


def counters(at: float, generated: float, latency_s: float, requests: float) -> list[ServerCounters]:
    values = {
        "sglang:generation_tokens_total": generated,
        "sglang:e2e_request_latency_seconds_sum": latency_s,
        "sglang:e2e_request_latency_seconds_count": requests,
    }
    return [ServerCounters(server=server, at=at, values=values) for server in SERVERS]


def test_time_is_split_by_the_servers_own_counters() -> None:
    """With them, what a request takes beyond its server's time is the network; without, it is unknown."""
    known = figures(measurement(server_counters=[*counters(10, 0, 0, 0), *counters(30, 2000, 18, 10)]))
    unknown = figures(measurement())

    assert (0.5, 0.2, 1.8) == pytest.approx(
        (
            known.seconds_per_request.queue,
            known.seconds_per_request.network,
            known.seconds_per_request.server,
        )
    )
    assert pytest.approx(0.002) == known.seconds_per_request.checks
    assert pytest.approx(1.0) == known.share_of_counters, "4,000 tokens in 20 s"
    assert (None, 2.0) == (unknown.seconds_per_request.network, unknown.seconds_per_request.server)
    assert unknown.share_of_counters is None


def test_the_network_is_what_is_left_of_the_same_requests() -> None:
    """Counters span the measured part: the longer requests of a shorter window are not longer on the way."""
    requests = [request(n, 11.0 + n, 12.0 + n) for n in range(4)] + [
        request(n, 16.0 + n, 19.0 + n) for n in range(4, 8)
    ]
    spans = [*counters(10, 0, 0, 0), *counters(30, 800, 7.6, 4)]  # 1.9 s each, of 2 s
    steady = Interval(20.0, 30.0)
    found = figures(measurement(requests, server_counters=spans, steady=steady)).seconds_per_request

    assert (0.1, 2.9) == pytest.approx((found.network, found.server))


def test_a_counter_that_appears_within_the_run_was_0() -> None:
    """Prometheus clients show a counter with labels from its first increment on."""
    first = [ServerCounters(server=server, at=10, values={}) for server in SERVERS]
    found = figures(measurement(server_counters=[*first, *counters(30, 2000, 18, 10)]))

    assert pytest.approx(1.0) == found.share_of_counters


def test_counters_that_one_server_lacks_are_not_used() -> None:
    """The sum over some of the servers would be compared with the requests of all."""
    partly = [*counters(10, 0, 0, 0), *counters(30, 2000, 18, 10)[:1]]

    assert figures(measurement(server_counters=partly)).share_of_counters is None


def test_the_client_and_the_servers_over_time() -> None:
    """CPU a request, loop lag, shares of capacity and of the servers' own figures."""
    ticks = [tick(float(at), {"generated_per_s": 125.0}) for at in range(1, 41)]
    found = figures(measurement(ticks=ticks, capacity_tokens_per_s=250.0))

    assert pytest.approx(100.0) == found.client.cpu_ms_per_request, "2 s of CPU for 20 answers"
    assert pytest.approx(0.1) == found.client.cpu_share
    assert pytest.approx(1.0) == found.client.loop_lag_ms
    assert pytest.approx(0.8) == found.share_of_reported
    assert pytest.approx(0.8) == found.share_of_capacity
    assert [100.0, 100.0] == pytest.approx([server.tokens_per_s for server in found.servers])
    assert 40 == len(found.over_time.at) == len(found.over_time.servers[0].cap)


def test_long_runs_are_averaged_over_time() -> None:
    """Thousands of ticks become a few hundred points with the same means."""
    ticks = [tick(float(at), {"cap": at % 2}, rows_waiting=at % 2) for at in range(1, 3001)]

    found = figures(measurement(ticks=ticks)).over_time

    assert 300 == len(found.at) == len(found.rows_waiting)
    assert {0.5} == set(found.rows_waiting) == set(found.servers[0].cap)


@pytest.mark.parametrize(
    "empty", [measurement([], []), measurement([], [tick(1.0)]), measurement(steady_requests(1), [])]
)
def test_a_run_in_which_nothing_happened_has_figures(empty: Measurement) -> None:
    """A benchmark that was stopped at once reports zeros, not a traceback."""
    assert 0.0 == figures(empty).useful_tokens_per_s
