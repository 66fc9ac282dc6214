"""Rejects at the beginning are held back until something succeeds; too many of them stop a run."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from streamsyn.config.loading import load
from streamsyn.pipeline.reject_limits import RejectLimits
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run
from streamsyn.pipeline.summary import RunSummary
from streamsyn.pipeline.workers import Results, Worker, WorkerPool
from streamsyn.queues import Backlog, BoundedQueue
from streamsyn.records import Attempt, Outcome, Reject, RejectReason, Work
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.telemetry import Counters
from tests.builders import context, rows
from tests.builders import reject as bad_line


class Limits:
    """Limits that note how they stopped the run."""

    def __init__(self, allowed: float = 0.5) -> None:
        self.stopped: list[tuple[str, bool]] = []
        self.counters = Counters()
        self.limits = RejectLimits(
            allowed, lambda *how: self.stopped.append(how), lambda _: "see key", self.counters
        )

    def take(self, *outcomes: Outcome) -> list[Outcome]:
        """What is written of outcomes that begin and end one after the other."""
        results = Backlog[Outcome](1000)
        limited = Results(results, self.limits)
        for outcome in outcomes:
            self.limits.began()
            limited.put(outcome)
        return results.get_nowait(1000)


def rejects(number: int, reason: RejectReason = RejectReason.REQUEST_REFUSED) -> list[Reject]:
    """Rejects of drafts that a server was asked for."""
    attempt = Attempt("http://a", 0.0, 0.1, "refused", 0)
    return [
        replace(bad_line(n), reason=reason, detail="no system role", attempts=[attempt], wasted_tokens=3)
        for n in range(number)
    ]


def test_rejects_are_held_until_the_first_context() -> None:
    case, held = Limits(), rejects(31)
    assert case.take(*held) == []
    assert case.take(context(1)) == [*held, context(1)]
    assert case.take(*rejects(40)) == rejects(40)
    assert case.stopped == []


def test_32_rejects_for_one_reason_stop_the_run_and_are_not_written() -> None:
    case = Limits()
    assert case.take(*rejects(40)) == []
    ((why, at_once),) = case.stopped
    assert "32 drafts were rejected as request_refused before any context was written" in why
    assert "no system role (see key)" in why
    assert at_once
    assert case.limits.end(drop=False) == []
    assert case.counters.wasted_tokens == 3 * 40


def test_a_context_in_flight_meanwhile_is_written() -> None:
    case = Limits()
    case.take(*rejects(32))
    assert case.take(context(1), *rejects(1)) == [context(1)]


def test_refusals_are_quicker_than_answers() -> None:
    """Those in flight may succeed: a tenth of the seeds is refused at once, and the others take a minute."""
    case = Limits()
    for _ in range(100):
        case.limits.began()
    case.take(*rejects(99))
    assert case.stopped == []
    case.take(*rejects(1))
    assert len(case.stopped) == 1


def test_several_reasons_are_not_one_mistake() -> None:
    case = Limits()
    held = rejects(31) + rejects(31, RejectReason.TOO_SHORT)
    assert case.take(*held) == []
    assert case.stopped == []
    assert case.limits.end(drop=False) == held


def test_lines_that_are_no_seeds_do_not_count() -> None:
    case = Limits()
    lines = [bad_line(n) for n in range(300)]
    assert case.take(*lines) == lines
    assert case.stopped == []


def test_the_share_is_judged_from_200_outcomes_on() -> None:
    case = Limits(allowed=0.5)
    case.take(context(0), *rejects(198))
    assert case.stopped == []
    assert case.take(*rejects(2)) == rejects(2)
    ((why, at_once),) = case.stopped  # once
    assert "99.5% of 200 outcomes are rejects, more than run.max_reject_fraction = 50.0%" in why
    assert not at_once


def test_a_share_at_the_limit_does_not_stop_a_run() -> None:
    """Of 100 contexts, 102 rejects and 2 drafts in flight, which count as if they would succeed."""
    case = Limits(allowed=0.5)
    for _ in range(2):
        case.limits.began()
    case.take(*map(context, range(100)), *rejects(102))
    assert case.stopped == []
    case.take(*rejects(1))
    assert len(case.stopped) == 1


def test_1_accepts_any_rejects() -> None:
    case = Limits(allowed=1.0)
    assert case.take(*rejects(300)) == rejects(300)
    assert case.stopped == []


async def test_an_item_begins_when_there_is_room() -> None:
    """One that waits for room is not in flight yet."""
    case, results = Limits(), Backlog[Outcome](1)
    limited = Results(results, case.limits)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        await limited.room()
        limited.put(context(0))
        beginning = group.create_task(limited.room())
        await asyncio.sleep(0)
        waited = not beginning.done()
        results.done()
    assert waited
    assert case.limits._in_flight == 1


@pytest.mark.parametrize("drains", [False, True])
async def test_what_is_held_at_the_end_is_written_or_left_to_a_later_run(*, drains: bool) -> None:
    """A run that drains leaves the drafts to the next one, which asks them again."""
    case, results = Limits(), Backlog[Outcome](9)
    held = rejects(3)

    class Rejecting(Worker):
        def __init__(self) -> None:
            """Needs nothing."""

        async def run(
            self, _work: BoundedQueue[Work], results: Results, _goes_on: Callable[[], bool]
        ) -> bool:
            for reject in held:
                await results.room()
                results.put(reject)
            if drains:
                pool.drain()
            return True

    pool = WorkerPool(Rejecting, lambda: 1, 3, limits=case.limits)
    await pool.run(BoundedQueue[Work](1), results)
    assert pool.left_work == drains
    assert results.get_nowait(9) == ([] if drains else held)
    assert case.counters.wasted_tokens == (9 if drains else 0)


def run_at(server: SimulatorConfig, root: Path, contexts_per_seed: int) -> RunSummary:
    """A run of 40 seeds in virtual time."""
    lines = [{"instruction": f"Who kept light {n}?", "answer": f"Keeper {n}."} for n in range(40)]
    (root / "seeds.jsonl").write_bytes(b"\n".join(map(orjson.dumps, lines)))
    servers = InProcessServers({"http://gpu:30000": Simulation(server)})
    settings = [
        ("seeds.sources", [{"path": str(root / "seeds.jsonl")}]),
        ("fleet.servers", ["http://gpu:30000"]),
        ("assembly.contexts_per_sample", 2),
        ("recipe.contexts_per_seed", contexts_per_seed),
    ]
    request = RunRequest(
        config=load(None, settings),
        out=root / "out",
        connect=servers.connect,
        runner=servers.run,
        show_progress=False,
    )
    return run(request)


@pytest.mark.parametrize("contexts_per_seed", [1, 2])
def test_a_server_that_fails_every_request_uses_up_no_seeds(tmp_path: Path, contexts_per_seed: int) -> None:
    """Mended, the run makes a context of each."""
    summary = run_at(SimulatorConfig(faults={"bad_json": 1.0}), tmp_path, contexts_per_seed)
    assert summary.too_many_rejects
    assert "broken_response" in (summary.stopped or "")
    assert (summary.contexts, summary.rejects) == (0, 0)

    summary = run_at(SimulatorConfig(), tmp_path, contexts_per_seed)
    assert summary.stopped is None
    assert (summary.contexts, summary.rejects) == (40 * contexts_per_seed, 0)
    assert len(rows(tmp_path / "out", "contexts")) == 40 * contexts_per_seed
