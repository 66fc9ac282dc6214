"""Runs in an event loop that is not theirs: several at once, stopped from outside."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from streamsyn.config.loading import load
from streamsyn.errors import DirectoryInUse
from streamsyn.pipeline.delivery import SampleGate
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run_in_loop
from streamsyn.pipeline.stop import RunControl
from streamsyn.pipeline.summary import RunSummary
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from streamsyn.sink.rundir import RunDirectory
from tests.builders import rows

URL = "http://gpu-1:30000"


class Runs:
    """Runs at one simulated server, in virtual time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.servers = InProcessServers({URL: Simulation(SimulatorConfig())})

    def request(self, name: str, seeds: int = 6, **given: Any) -> RunRequest:
        source = self.root / f"{name}.jsonl"
        pairs = [{"instruction": f"{name} {n}?", "answer": f"Keeper {n}."} for n in range(seeds)]
        source.write_bytes(b"\n".join(map(orjson.dumps, pairs)))
        settings = {
            "seeds.sources": [{"path": str(source)}],
            "fleet.servers": [URL],
            "assembly.contexts_per_sample": 2,
            "run.queue_size": 8,
            "sink.sync_rows": 8,
        }
        return RunRequest(
            config=load(None, settings.items()),
            out=self.root / f"out-{name}",
            connect=self.servers.connect,
            handles_signals=False,
            show_progress=False,
            **given,
        )

    def together(self, *requests: RunRequest) -> list[RunSummary]:
        """Run them side by side in one loop."""
        summaries: list[RunSummary] = []

        async def each(request: RunRequest) -> None:
            summaries.append(await run_in_loop(request))

        async def all_of_them() -> None:
            async with asyncio.TaskGroup() as group:
                for request in requests:
                    group.create_task(each(request), name=request.out.name)

        self.servers.run(all_of_them())
        return summaries


class Gate(SampleGate):
    """Lets `free` samples pass; then the run waits until it is opened."""

    def __init__(self, free: int, when_full: RunControl | None = None) -> None:
        self._free = free
        self._opened = threading.Event()
        self._when_full = when_full
        self.seen: list[int] = []

    def written(self, samples: int) -> None:
        self.seen.append(samples)
        if samples > self._free and not self._opened.is_set():
            if self._when_full is not None:
                self._when_full.cancel("enough")
            self._opened.wait()

    def stop(self) -> None:
        self._opened.set()


def ids(root: Path, kinds: Sequence[str] = ("contexts", "samples")) -> list[int]:
    return [len({row["seed_id"] for row in rows(root, kind)}) for kind in kinds]


def test_runs_share_a_loop(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    requests = [runs.request(name) for name in "abc"]
    summaries = runs.together(*requests)
    assert [(summary.contexts, summary.samples, summary.stopped) for summary in summaries] == [
        (6, 6, None)
    ] * 3
    assert [ids(request.out) for request in requests] == [[6, 6]] * 3


def test_what_is_asked_before_the_run_begins_takes_effect(tmp_path: Path) -> None:
    runs, control = Runs(tmp_path), RunControl()
    control.drain("not today")
    (summary,) = runs.together(runs.request("a", control=control))
    assert (summary.stopped, summary.contexts) == ("not today", 0)
    (resumed,) = runs.together(runs.request("a"))
    assert (resumed.stopped, resumed.contexts) == (None, 6)


async def test_a_gate_holds_up_the_run_until_it_is_stopped(tmp_path: Path) -> None:
    """Samples that were not made are made by the next run. In real time: virtual time has no threads."""
    runs, control = Runs(tmp_path), RunControl()
    gate = Gate(3, control)
    request = runs.request("a", seeds=400, control=control, after_samples=gate)
    summary = await run_in_loop(request)
    assert summary.stopped == "enough"
    assert summary.contexts < 400
    assert gate.seen[-1] < 400
    resumed = await asyncio.to_thread(runs.together, runs.request("a", seeds=400))
    assert (resumed[0].contexts, resumed[0].samples) == (400, 400)


def test_a_cancelled_run_leaves_its_directory_free(tmp_path: Path) -> None:
    """Wherever the cancellation arrives: while the directory is opened, at work, while it is closed."""
    for steps in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144):
        runs = Runs(tmp_path)
        request = runs.request(f"a{steps}")

        async def cancelled(request: RunRequest, steps: int) -> None:
            async with asyncio.TaskGroup() as group:
                running = group.create_task(_run(request), name="run")
                for _ in range(steps):
                    await asyncio.sleep(0)
                running.cancel()

        runs.servers.run(cancelled(request, steps))
        RunDirectory(request.out).close()  # not in use
        assert runs.together(request)[0].contexts == 6


async def _run(request: RunRequest) -> None:
    await run_in_loop(request)


def test_one_that_cannot_run_harms_no_other(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    taken, other = runs.request("a"), runs.request("b")
    held = RunDirectory(taken.out)

    async def refused() -> None:
        with pytest.raises(DirectoryInUse):
            await run_in_loop(taken)

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(refused(), name="refused")
            group.create_task(run_in_loop(other), name="other")

    runs.servers.run(both())
    assert ids(other.out) == [6, 6]
    held.close()
    assert runs.together(taken)[0].contexts == 6
