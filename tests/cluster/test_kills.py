"""The long form: many kills, nodes that are cut off, servers that come and go (`make torture-ray`)."""

import asyncio
import os
import select
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

import streamsyn
from streamsyn.config.command_sections import ClusterSection
from streamsyn.fleet.launch import find_packaged_model, find_python
from streamsyn.pipeline.verify import verify
from tests.builders import rows
from tests.cluster.conftest import CutNode, Raylets
from tests.cluster.seen import check_guarantees, watched
from tests.cluster.test_submit import IN_FLIGHT, NODE, command, simulated

pytestmark = [
    pytest.mark.ray,
    pytest.mark.torture,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

KILLS = int(os.environ.get("STREAMSYN_KILLS", "10"))
CAP = 8
"""Requests in flight at a server."""
SIMULATE = (sys.executable, "-m", "streamsyn", "simulate", "--host", "{host}", "--port", "{port}")
_MOST_OUTCOMES = 20_000
SLOW = (*SIMULATE, "--latency-ms", "300")


@dataclass
class Feed:
    """A run that always has seeds, until it is told to end."""

    run: streamsyn.Run
    ids: list[str] = field(default_factory=list)
    ends: bool = False
    outcomes: int = 0

    async def begin(self) -> None:
        """Give it the first seeds."""
        await self._more()

    async def each(self) -> AsyncIterator[int]:
        """Yield the number of outcomes, at each."""
        async for _ in self.run.outcomes():
            self.outcomes += 1
            assert self.outcomes < _MOST_OUTCOMES, "it waits for something that does not come"
            yield self.outcomes
            if self.ends:
                await self.run.close_seeds()
            elif self.outcomes > len(self.ids) - 100:
                await self._more()

    async def _more(self) -> None:
        new = [f"seed-{len(self.ids) + n}" for n in range(200)]
        self.ids += new
        await self.run.submit([{"id": one, "instruction": f"{one}?", "answer": one} for one in new])


def overrides(raylets: Raylets, **cluster: Any) -> dict[str, Any]:
    """Two servers, each with all that a node has; shards and samples that are made while it runs."""
    given = {"address": raylets.address, "model": "simulated", "replicas": 2, "gpus_per_replica": 8}
    section = ClusterSection(**{**given, "command": SLOW, **cluster})
    return {
        "cluster": section.model_dump(mode="json"),
        "fleet.concurrency": CAP,
        "fleet.max_in_flight": 3 * CAP,
        "fleet.hedge_tail": False,  # it asks for the slowest answers twice
        "assembly.contexts_per_sample": 2,
        "sink.shard_bytes": 100_000,
    }


async def test_ten_kills_in_a_row(raylets: Raylets, tmp_path: Path) -> None:
    """A node is killed and another one added, again and again, in one run."""
    raylets.at_least(2)
    out, deaths = tmp_path / "out", list[float]()
    with watched() as seen:
        async with streamsyn.open_run(
            out=out, overrides=overrides(raylets), keep_open=True, preflight=False
        ) as run:
            feed, after = Feed(run), 60
            await feed.begin()
            async for outcomes in feed.each():
                if outcomes < after or seen.alive < 2:
                    continue
                feed.ends = len(deaths) == KILLS
                if not feed.ends:
                    deaths.append(time.monotonic())
                    await raylets.kill_node()
                    raylets.at_least(2)
                    after = outcomes + 60
    await asyncio.to_thread(check_guarantees, out, feed.ids)
    repeated = seen.repeated(feed.outcomes)
    assert 0 <= repeated <= KILLS * CAP
    assert [] == seen.sent_to_ghosts()
    refused = sum(one.refused for one in seen.sent)
    print(
        f"\n{KILLS} kills, {feed.outcomes} seeds: {repeated} requests repeated, {refused} refused by dead "
        f"servers; seconds from a node's death to the last request sent there: {seen.after_death(deaths)}"
    )


async def test_a_node_is_cut_off(raylets: Raylets, tmp_path: Path) -> None:
    """What runs there neither answers nor hangs up; when it comes back it is not asked."""
    raylets.at_least(2)
    out, cut = tmp_path / "out", list[tuple[float, CutNode]]()
    with watched() as seen:
        try:
            async with streamsyn.open_run(
                out=out, overrides=overrides(raylets), keep_open=True, preflight=False
            ) as run:
                feed = Feed(run)
                await feed.begin()
                came_back = 0
                async for outcomes in feed.each():
                    if outcomes >= 60 and not cut and seen.alive == 2:
                        cut.append((time.monotonic(), await asyncio.to_thread(raylets.cut_node)))
                        raylets.at_least(2)
                    elif cut and not came_back and len(seen.of("cluster.server_ready")) == 3:
                        cut[0][1].resume()
                        came_back = outcomes
                    feed.ends = 0 < came_back < outcomes - 200
        finally:
            for _, node in cut:
                await asyncio.to_thread(raylets.kill, node.node)
    await asyncio.to_thread(check_guarantees, out, feed.ids)
    assert 1 == len(seen.lost_urls())
    assert [] == seen.sent_to_ghosts()
    repeated = seen.repeated(feed.outcomes)
    assert 0 <= repeated <= CAP
    print(
        f"\na node is cut off, {feed.outcomes} seeds: {repeated} requests repeated; seconds from the cut to "
        f"the last request sent there: {seen.after_death([at for at, _ in cut])}, until it was known: "
        f"{seen.of('cluster.server_lost')[0]['at'] - cut[0][0]:.1f}"
    )


async def test_servers_are_added_and_given_up(
    raylets: Raylets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One server, three while there is work for them, and fewer when the last answers are waited for."""
    from streamsyn.cluster import placing

    raylets.at_least(3)
    monkeypatch.setattr(placing, "_SCALE_S", 0.5)
    out, path = tmp_path / "out", tmp_path / "seeds.jsonl"
    ids = [f"seed-{n}" for n in range(150)]
    text = "".join(f'{{"id": "{one}", "instruction": "{one}?", "answer": "{one}"}}\n' for one in ids)
    await asyncio.to_thread(path.write_text, text)
    varied = (*SIMULATE, "--latency-ms", "4000", "--jitter-ms", "3900")
    given = overrides(raylets, replicas=1, max_replicas=3, idle_s=0.2, command=varied)
    with watched() as seen:
        async with streamsyn.open_run(out=out, seeds=path, overrides=given, preflight=False) as run:
            await run.wait()
    await asyncio.to_thread(check_guarantees, out, ids)
    assert len(ids) == len(seen.sent), "a server that is given up answers first"
    assert [] == seen.sent_to_ghosts()
    scaled = [entry["servers"] for entry in seen.of("cluster.scaled")]
    assert 3 == max(scaled) > scaled[-1]
    print(f"\nservers: 1, then {scaled}; no request was repeated")


@pytest.mark.parametrize("kills", [5])
async def test_the_node_of_the_run_dies_again_and_again(
    raylets: Raylets, tmp_path: Path, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time the run goes on on another node, without a pause: each had begun."""
    from streamsyn.cluster import submitted as driver
    from streamsyn.cluster.submitted import submitted

    monkeypatch.setattr(driver._Driver, "_pause", pytest.fail)
    raylets.at_least(2)
    deaths, printed = list[float](), bytearray()
    async with simulated() as (url, requests):
        given = await asyncio.to_thread(command, tmp_path, url, 100 * (kills + 1))
        async with asyncio.TaskGroup() as group:
            running_it = group.create_task(
                submitted(given, raylets.address, printed.extend, NODE), name="submit"
            )
            for number in range(1, kills + 1):
                await requests.until(100 * number)
                await raylets.kill_node()
                deaths.append(time.monotonic())
                raylets.at_least(2)
    assert 0 == running_it.result(), printed.decode()
    ids = await asyncio.to_thread(seed_ids, tmp_path / "out")
    assert 100 * (kills + 1) == len(ids)
    await asyncio.to_thread(check_guarantees, tmp_path / "out", ids)
    again = [next(at for at in requests.times if at > died) - died for died in deaths]
    repeated = len(requests.times) - len(ids)
    assert 0 <= repeated <= kills * IN_FLIGHT
    print(
        f"\n{kills} coordinators died, {len(ids)} seeds: {repeated} requests repeated; seconds from a death "
        f"to the next request: {[round(seconds, 1) for seconds in again]}"
    )


def seed_ids(out: Path) -> list[str]:
    """The seeds that have an outcome, each once."""
    return sorted({row["seed_id"] for kind in ("contexts", "rejects") for row in rows(out, kind)})


def ended(process: psutil.Process) -> bool:
    """Wait until a process has ended, though its parent, which is stopped, does not look at it."""
    descriptor = os.pidfd_open(process.pid)
    try:
        return bool(select.select([descriptor], [], [], 60)[0])
    finally:
        os.close(descriptor)


async def test_a_run_that_was_cut_off_comes_back(raylets: Raylets, tmp_path: Path) -> None:
    """Another one goes on in its place. It notices, and ends before it writes."""
    from streamsyn.cluster.submitted import submitted

    raylets.at_least(2)
    printed, cut = bytearray(), list[CutNode]()
    try:
        async with simulated() as (url, requests):
            given = await asyncio.to_thread(command, tmp_path, url, 300)
            async with asyncio.TaskGroup() as group:
                running_it = group.create_task(
                    submitted(given, raylets.address, printed.extend, NODE), name="submit"
                )
                await requests.until(80)
                cut.append(await asyncio.to_thread(raylets.cut_node))
                began, asked = time.monotonic(), len(requests.times)
                await requests.until(asked + 40)
                again = next(at for at in requests.times[asked:] if at > began + 1) - began
                ghost = await asyncio.to_thread(cut[0].resume, "streamsyn", "run")
                ends = [await asyncio.to_thread(ended, process) for process in ghost]
    finally:
        for node in cut:
            await asyncio.to_thread(raylets.kill, node.node)
    assert [True] == ends, "it goes on"
    assert 0 == running_it.result(), printed.decode()
    ids = await asyncio.to_thread(seed_ids, tmp_path / "out")
    assert 300 == len(ids)
    await asyncio.to_thread(check_guarantees, tmp_path / "out", ids)
    repeated = len(requests.times) - len(ids)
    assert 0 <= repeated <= 2 * IN_FLIGHT, "of the run that was cut off: in flight then, and once it was back"
    print(f"\na run is cut off: {again:.1f} s until another one asks; {repeated} requests repeated")


async def test_a_real_server_is_placed_and_its_node_dies(raylets: Raylets, tmp_path: Path) -> None:
    """The SGLang that deploy/sglang-cpu installs; it is started again on another node."""
    raylets.at_least(2)
    out, deaths, seeds = tmp_path / "out", list[float](), 24
    path = Path(__file__).parents[1] / "real/seeds.jsonl"
    python, model = await asyncio.to_thread(find_python), await asyncio.to_thread(find_packaged_model)
    given = {
        **overrides(raylets, command=(), replicas=1, python=python, model=str(model)),
        "fleet.max_in_flight": 4,
        "seeds.limit": seeds,
        "checks.min_words": 5,
        "recipe.tries": 1,
        "recipe.target_words": 60,
        "recipe.max_tokens": 32,
        "recipe.on_truncated": "continue",
    }
    with watched() as seen:
        async with streamsyn.open_run(out=out, seeds=path, overrides=given, preflight=False) as run:
            number = 0
            async for _ in run.outcomes():
                number += 1
                if number == 6:
                    deaths.append(time.monotonic())
                    await raylets.kill_node()
    _, second = (entry["at"] for entry in seen.of("cluster.server_ready"))
    assert [] == seen.sent_to_ghosts()
    assert number == len(await asyncio.to_thread(seed_ids, out)) > 6
    problems, _ = await asyncio.to_thread(verify, out)
    assert [] == problems
    print(
        f"\na real SGLang: its node dies; another is ready {second - deaths[0]:.0f} s later; {number} seeds; "
        f"seconds to the last request sent there: {seen.after_death(deaths)}"
    )
