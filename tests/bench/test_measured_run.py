"""Measured runs of the real stages, at simulated servers in virtual time."""

import itertools
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from streamsyn.bench.figures import counter_growth, figures
from streamsyn.bench.measured_run import RunToMeasure, measure
from streamsyn.bench.measurement import Interval, Load, Measurement
from streamsyn.bench.phases import in_flight
from streamsyn.bench.server_counters import parse_counters
from streamsyn.config.loading import load
from streamsyn.errors import ConfigError
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import Fault, SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.simulator.timeline import Event, Timeline

URLS = ("http://gpu-0:30000", "http://gpu-1:30000")
SECOND_EACH = {"latency_ms": 1000.0, "slots": 64}
"""Every answer takes a second."""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files of the test go."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., RunToMeasure]:
    """A run at two servers, with a cap of 4 for each, 2 s of warm-up and 10 s measured."""
    path = tmp_path / "seeds.jsonl"
    rows = [{"id": f"s{n}", "instruction": f"What of {n}?", "answer": f"It is {n}."} for n in range(50)]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows) + b"no seed\n")

    def request(
        settings: dict[str, Any] | None = None,
        timelines: dict[str, Timeline] | None = None,
        server: dict[str, Any] | None = None,
        script: Callable[[int, dict[str, Any]], Fault | None] | None = None,
        load_of: Load | None = None,
        **given: Any,
    ) -> RunToMeasure:
        fixed = {
            "seeds.sources": [{"path": str(path)}],
            "fleet.servers": list(URLS),
            "assembly.contexts_per_sample": 2,
        }
        config = SimulatorConfig(**(SECOND_EACH if server is None else server))

        def servers() -> InProcessServers:
            return InProcessServers({url: Simulation(config, script) for url in URLS}, timelines or {})

        return RunToMeasure(
            config=load(None, {**fixed, **(settings or {})}.items()),
            load=load_of or Load(cap=4, warmup_s=2.0, duration_s=10.0),
            simulated=servers,
            **{"handles_signals": False, **given},
        )

    return request


def load_over_time(run: Measurement, within: Interval, bins: int) -> Sequence[float]:
    return [round(number, 1) for number in in_flight(run.requests, within, bins)]


def test_a_closed_loop_keeps_the_cap_in_flight(asked: Callable[..., RunToMeasure], temporary: Path) -> None:
    """From the warm-up into the measured part without a gap; then comes the drain, and nothing is left."""
    run = measure(asked())

    assert run.is_complete
    assert (0.0, 2.0, 12.0) == (run.warm_up.begins_at, run.measured.begins_at, round(run.measured.ends_at, 3))
    assert [8.0] * 10 == load_over_time(run, run.measured, 10)
    assert [8.0, 8.0] == load_over_time(run, Interval(1.5, 2.5), 2)  # around the end of the warm-up
    assert 0 < run.drain.seconds <= 1.01
    assert run.measured == run.steady
    assert pytest.approx(8.0, rel=0.01) == figures(run).contexts_per_s
    assert list(URLS) == [server.server for server in run.ticks[-1].servers]
    assert ["simulated"] == run.models
    assert 2 == run.gpus
    assert [] == list(temporary.iterdir())


def test_seeds_that_run_out_are_begun_again(asked: Callable[..., RunToMeasure]) -> None:
    """As new drafts; invalid lines are not, and the number of repeats is known."""
    run = measure(asked())
    ids = [draft.seed_id for draft in run.drafts]

    assert len(ids) == len(set(ids))
    assert 50 == run.seeds
    assert len(ids) - 50 == run.repeats > 0


def test_the_next_run_goes_on_where_this_one_has_read(asked: Callable[..., RunToMeasure]) -> None:
    """So that its prompts are not in the caches."""
    short = Load(cap=2, warmup_s=0.0, duration_s=2.0)
    first = measure(asked(load_of=short, settings={"run.queue_size": 1, "seeds.group_window": 0}))
    second = measure(asked(load_of=short, skip=20))

    assert "s0" == first.drafts[0].seed_id
    assert "s20" == second.drafts[0].seed_id


def test_an_open_loop_begins_drafts_at_its_rate(asked: Callable[..., RunToMeasure]) -> None:
    """Whatever is in flight: slow answers do not hold it up."""
    slow = {"latency_ms": 20_000.0, "slots": 1000}
    run = measure(asked(server=slow, load_of=Load(rate=20.0, warmup_s=0.0, duration_s=15.0)))
    begun = [draft.begun_at for draft in run.drafts if run.measured.holds(draft.begun_at)]
    gaps = [after - before for before, after in itertools.pairwise(begun)]

    assert 300 == pytest.approx(len(begun), abs=4 * 300**0.5)  # Poisson
    assert 0.05 == pytest.approx(sum(gap**2 for gap in gaps) ** 0.5 / (2 * len(gaps)) ** 0.5, rel=0.2)
    assert max(load_over_time(run, run.measured, 15)) > 230
    assert run.measured == run.steady


def test_a_run_with_a_log_measures_the_disk(asked: Callable[..., RunToMeasure], tmp_path: Path) -> None:
    """The log is written where it is asked for, and deleted."""
    folder = tmp_path / "out"
    folder.mkdir()
    run = measure(asked(load_of=Load(cap=4, warmup_s=2.0, duration_s=4.0, with_log=True), folder=folder))

    assert run.is_complete
    assert [8.0] * 4 == load_over_time(run, run.measured, 4)
    assert run.ticks[-1].disk_s > 0
    assert [] == list(folder.iterdir())


def test_an_open_loop_may_have_a_log(asked: Callable[..., RunToMeasure], tmp_path: Path) -> None:
    """Drafts begin at the rate, and are on disk at the end."""
    limits = Load(rate=20.0, warmup_s=0.0, duration_s=5.0, with_log=True)
    run = measure(asked(server={"latency_ms": 4_000.0, "slots": 1000}, load_of=limits, folder=tmp_path))
    begun = [draft for draft in run.drafts if run.measured.holds(draft.begun_at)]

    assert run.is_complete
    assert 100 == pytest.approx(len(begun), abs=4 * 100**0.5)  # Poisson
    assert max(load_over_time(run, run.measured, 5)) > 50
    assert run.ticks[-1].disk_s > 0


def test_the_steps_of_a_draft_are_recorded_in_order(asked: Callable[..., RunToMeasure]) -> None:
    """With their prefix group, also where a journal keeps them."""
    sections = {
        "recipe.use": "sections",
        "recipe.target_tokens": 2000,
        "recipe.section_tokens": 400,
        "checks.max_repetition": 1.0,
        "run.queue_size": 4,
    }
    limits = Load(cap=2, warmup_s=0.0, duration_s=4.0, with_log=True)
    run = measure(asked(sections, server={"latency_ms": 200.0, "words": 250}, load_of=limits))
    finished = [index for index, draft in enumerate(run.drafts) if draft.outcome == "context"]
    steps = [request.step for request in run.requests if request.draft == finished[0]]

    assert len(steps) > 3
    assert list(range(len(steps))) == steps
    assert {""} != {request.group for request in run.requests}


def test_a_run_whose_servers_are_gone_reports_what_it_has(asked: Callable[..., RunToMeasure]) -> None:
    """The measured part ends there, and the reason is kept."""
    timelines = {url: Timeline([Event(6.0, die=True)]) for url in URLS}
    run = measure(asked({"fleet.give_up_s": 3.0}, timelines))

    assert not run.is_complete
    assert "no server" in run.stopped or "no usable server" in run.stopped
    assert 6.0 < run.measured.ends_at < 12.0
    assert run.steady is not None
    assert run.steady.ends_at < 7.5


def test_a_signal_ends_the_measured_part(asked: Callable[..., RunToMeasure]) -> None:
    """What is in flight finishes, and what was measured is kept."""

    def interrupt(phase: str) -> None:
        if phase == "measuring":
            os.kill(os.getpid(), signal.SIGINT)

    run = measure(asked(handles_signals=True, on_phase=interrupt))

    assert "stopped by SIGINT" == run.stopped
    assert 2.0 <= run.measured.ends_at <= 3.1
    assert all(draft.outcome != "unfinished" for draft in run.drafts if draft.begun_at < 2.0)


def test_a_mistake_of_the_whole_set_up_stops_the_run(asked: Callable[..., RunToMeasure]) -> None:
    """As in a run: the first answers all fail for one reason."""
    run = measure(asked({"checks.min_words": 500}, load_of=Load(cap=16, warmup_s=2.0, duration_s=30.0)))

    assert run.has_too_many_rejects
    assert "too_short" in run.stopped


def test_tokens_of_rejects_and_failed_tries_are_not_useful(asked: Callable[..., RunToMeasure]) -> None:
    """The useful tokens of requests add up to those of the contexts."""

    def failing(number: int, _: dict[str, Any]) -> Fault | None:
        return Fault.HTTP_500 if number % 5 == 0 else None

    run = measure(asked({"run.max_reject_fraction": 1.0}, script=failing))
    useful = sum(request.useful_tokens or 0.0 for request in run.requests)

    assert {"ok", "error"} == {request.ended for request in run.requests}
    assert useful > 0
    assert useful == pytest.approx(sum(draft.useful_tokens for draft in run.drafts))
    failed = [request for request in run.requests if request.ended == "error"]
    assert {"ServerUnavailable"} == {request.error for request in failed}
    assert 0 == sum(request.useful_tokens or 0.0 for request in failed)


def test_what_is_planned_to_be_cached_and_first_tokens_are_recorded(
    asked: Callable[..., RunToMeasure],
) -> None:
    """The first request with a prefix is streamed."""
    run = measure(asked(load_of=Load(cap=4, warmup_s=0.0, duration_s=4.0)))
    streamed = [request for request in run.requests if request.first_token_at is not None]

    assert streamed
    assert all(one.sent_at <= (one.first_token_at or 0.0) <= one.done_at for one in streamed)
    last = run.requests[-1]
    assert 0 < last.planned_cached_tokens <= last.prompt_tokens


def test_the_capacity_of_simulated_servers_is_that_of_their_cost_model(
    asked: Callable[..., RunToMeasure],
) -> None:
    """Full servers write nearly as much."""
    run = measure(
        asked(
            {"recipe.target_words": 100, "checks.max_repetition": 1.0},
            server={"cost_model": "h100", "slots": 16},
            load_of=Load(cap=20, warmup_s=4.0, duration_s=8.0),
        )
    )

    assert run.capacity_tokens_per_s is not None
    share = figures(run).share_of_capacity
    assert share is not None
    assert 0.85 < share < 1.05


def test_the_counters_of_servers_span_the_measured_part(asked: Callable[..., RunToMeasure]) -> None:
    """Read at its begin and at its end, where a server has them."""
    run = measure(asked())

    assert [2.0, 2.0, 12.0, 12.0] == [round(reading.at, 3) for reading in run.server_counters]
    grown = counter_growth(run, "sglang:generation_tokens_total")
    assert grown is not None
    assert grown == pytest.approx(figures(run).written_tokens_per_s * 10, rel=0.15)


def test_counters_are_summed_over_labels() -> None:
    """Buckets and gauges are left out."""
    text = """# TYPE a:tokens_total counter
a:tokens_total{model="m",rank="0"} 3
a:tokens_total{model="m",rank="1"} 4.5
# TYPE a:seconds histogram
a:seconds_bucket{le="1.0"} 2
a:seconds_bucket{le="+Inf"} 3
a:seconds_sum 2.5
a:seconds_count 3
# TYPE a:running gauge
a:running 7
"""

    expected = {"a:tokens_total": 7.5, "a:seconds_sum": 2.5, "a:seconds_count": 3.0}
    assert expected == parse_counters(text)


@pytest.mark.parametrize(
    ("settings", "given", "text"),
    [
        ({"checks.context_gain": True}, {}, "--with-log"),
        ({"seeds.sources": [{"path": "-"}]}, {}, "--seeds -"),
        ({"seeds.sources": []}, {}, "no seeds"),
        ({"fleet.servers": []}, {}, "no server"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    asked: Callable[..., RunToMeasure], settings: dict[str, Any], given: dict[str, Any], text: str
) -> None:
    """Before a server is asked."""
    with pytest.raises(ConfigError, match=text):
        measure(asked(settings, **given))
