"""Servers that Ray places, on several raylets of this machine, with the simulator in place of SGLang."""

import asyncio
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from structlog.testing import capture_logs

import streamsyn
from streamsyn.bench.kept_servers import kept_servers
from streamsyn.bench.measured_run import RunToMeasure
from streamsyn.bench.measurement import Load
from streamsyn.bench.series import repeated
from streamsyn.config.command_sections import ClusterSection
from streamsyn.config.loading import load
from streamsyn.errors import ConfigError, LaunchError, root_cause
from streamsyn.export.export_request import ExportRequest
from streamsyn.export.export_run import export
from streamsyn.fleet.server_spec import ServerSpec
from streamsyn.scoring.score_log import ScoreRequest, score
from streamsyn.scoring.sidecar import with_scores
from streamsyn.sink.partitions import begin_partitions
from tests.builders import rows
from tests.cluster.conftest import Raylets
from tests.export.support import make_run, scored, tree

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

SIMULATE = (sys.executable, "-m", "streamsyn", "simulate", "--host", "{host}", "--port", "{port}")
SLOW = (*SIMULATE, "--latency-ms", "300")


def section(raylets: Raylets, **given: Any) -> ClusterSection:
    """Two replicas of the simulator, each with all that a node has."""
    return ClusterSection(
        **{
            "address": raylets.address,
            "model": "simulated",
            "replicas": 2,
            "gpus_per_replica": 8,
            "command": SIMULATE,
            **given,
        }
    )


async def test_a_node_dies_in_a_run(raylets: Raylets, tmp_path: Path) -> None:
    """Each seed has one outcome, and Ray places another server on the node that has room."""
    raylets.at_least(3)
    seeds = tmp_path / "seeds.jsonl"
    text = "".join(f'{{"instruction": "{n}?", "answer": "{n}"}}\n' for n in range(400))
    await asyncio.to_thread(seeds.write_text, text)
    given = section(raylets, command=SLOW).model_dump(mode="json")
    overrides: dict[str, Any] = {"cluster": given, "fleet.concurrency": 8, "assembly.write": False}
    with capture_logs() as logs:
        async with streamsyn.open_run(out=tmp_path / "out", seeds=seeds, overrides=overrides) as run:
            began = 0
            async for _ in run.outcomes():
                began += 1
                if began == 60:
                    await raylets.kill_node()
    events = [entry["event"] for entry in logs]
    assert 1 == events.count("cluster.server_lost")
    found = await asyncio.to_thread(rows, tmp_path / "out", "contexts")
    assert {1} == set(Counter(row["seed_id"] for row in found).values())
    assert 400 == len(found)
    assert 3 == events.count("cluster.server_ready")
    assert {row["server"] for row in found} == {
        entry["server"] for entry in logs if entry["event"] == "cluster.server_ready"
    }


def test_a_benchmark_keeps_its_servers(raylets: Raylets, tmp_path: Path) -> None:
    """They are placed once for all measured runs of a command, and stopped after the last."""
    raylets.at_least(1)
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(f'{{"instruction": "{n}?", "answer": "{n}"}}\n' for n in range(400)))
    given = section(raylets, replicas=1, command=(*SIMULATE, "--latency-ms", "10"))
    overrides = [("seeds.sources", [{"path": str(seeds)}]), ("cluster", given.model_dump(mode="json"))]
    load_of = Load(cap=2, warmup_s=0.2, duration_s=0.3)
    asked = RunToMeasure(config=load(None, overrides), load=load_of, handles_signals=False)
    with capture_logs() as logs, kept_servers(given) as kept:
        runs = repeated(replace(asked, kept=kept), 2)
    ready = [entry["server"] for entry in logs if entry["event"] == "cluster.server_ready"]
    assert [ready] * 2 == [[server.server for server in run.ticks[-1].servers] for run in runs]
    assert all(run.is_complete for run in runs)


async def test_a_server_over_two_nodes_is_one_server(raylets: Raylets) -> None:
    """All its ranks get the address where they meet; if one ends, all are started again."""
    from streamsyn.cluster.placing import placed

    raylets.at_least(2)
    rank = (
        "import os, signal, sys; sys.argv[1] == '0' and os.execv(sys.argv[3], sys.argv[3:]); signal.pause()"
    )
    mark = f"rank-of-{os.getpid()}"
    command = (sys.executable, "-c", rank, "{rank}", mark, *SIMULATE, "--model", "{nodes}-{head}")
    async with placed(section(raylets, replicas=1, nodes_per_replica=2, command=command)) as servers:
        (first,) = servers.specs()
        (other_rank,) = [
            process
            for process in psutil.process_iter(["cmdline"])
            if mark in (process.info["cmdline"] or []) and "1" in process.info["cmdline"]
        ]
        other_rank.kill()
        await until_listed(servers, lambda specs: not specs)
        await until_listed(servers, lambda specs: len(specs) == 1)
        (second,) = servers.specs()
    assert first.incarnation != second.incarnation


async def until_listed(servers: Any, holds: Callable[[list[ServerSpec]], bool]) -> None:
    """Wait until something holds of the servers that are listed."""
    async with asyncio.timeout(60):
        while not holds(servers.specs()):
            servers.changed.clear()
            await servers.changed.wait()


async def test_a_server_that_cannot_start_ends_the_run(
    raylets: Raylets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line with its last words; nothing is left behind."""
    from streamsyn.cluster import placing

    raylets.at_least(1)
    monkeypatch.setattr(placing, "_RESTART_S", 0.01)
    broken = (sys.executable, "-c", "raise ValueError('no such model')")
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - a group
        async with placing.placed(section(raylets, replicas=1, command=broken)):
            pytest.fail("it started")
    cause = root_cause(caught.value)
    assert isinstance(cause, LaunchError)
    assert "ValueError: no such model" in str(cause)
    assert "\n" not in str(cause)


async def test_no_cluster_at_the_address() -> None:
    """One line."""
    from streamsyn.cluster.placing import placed

    with pytest.raises(ConfigError, match=r"cluster.address: no Ray cluster at 127.0.0.1:1\b"):
        async with placed(ClusterSection(address="127.0.0.1:1", model="m")):
            pytest.fail("there is one")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Data warns of its own defaults
def test_an_export_is_spread_over_the_nodes(
    raylets: Raylets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They sign the sealed shards of all partitions: the same bytes as without them."""
    from streamsyn.cluster import spread

    raylets.at_least(2)
    partitions = begin_partitions(tmp_path / "run", 2)
    make_run(partitions.directories[0], [scored(n) for n in range(60)], max_similarity=0.5)
    others = [scored(n, context=f"{n} " * 30) for n in range(60, 90)]
    make_run(partitions.directories[1], others, to_the_end=False, max_similarity=0.5)
    signed: list[int] = []
    table = spread.sign_shards

    def counted(paths: Sequence[Path]) -> Iterator[Any]:
        for one in table(paths):
            signed.append(len(paths))
            yield one

    monkeypatch.setattr(spread, "sign_shards", counted)
    alone = export(ExportRequest(root=tmp_path / "run", to=str(tmp_path / "alone")))
    spread_out = export(
        ExportRequest(root=tmp_path / "run", to=str(tmp_path / "spread"), ray=raylets.address)
    )

    assert 0 < alone.samples == spread_out.samples
    assert tree(tmp_path / "alone") == tree(tmp_path / "spread")
    assert 60 == len(signed), "those of the open shard are signed here"
    assert any(number > 1 for number in signed)
    with pytest.raises(ConfigError, match="no Ray cluster at"):
        export(ExportRequest(root=tmp_path / "run", to=str(tmp_path / "none"), ray="127.0.0.1:1"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Data warns of its own defaults
def test_a_score_is_spread_over_the_nodes(raylets: Raylets, tmp_path: Path) -> None:
    """They examine the sealed shards: the same near-duplicates and leaks as without them."""
    from streamsyn.cluster.placing import connected
    from streamsyn.cluster.spread import examine_shards

    raylets.at_least(2)
    leaked = "the keeper of the light wrote down every night which ships had passed the point"
    (tmp_path / "exam.txt").write_text(leaked)
    texts = {n: f"{n // 2} " * 40 + (leaked if n % 7 == 3 else "") for n in range(60)}
    found, examined = {}, 0

    def counted(*given: Any) -> Iterator[Any]:
        nonlocal examined
        for one in examine_shards(*given):
            examined += 1
            yield one

    for name, examine in (("alone", None), ("spread", counted)):
        root, made = make_run(tmp_path / name, [scored(n, context=texts[n]) for n in texts])
        checks = made.checks.model_copy(update={"eval_sets": [str(tmp_path / "exam.txt")], "similarity": 0.5})
        config = made.model_copy(update={"checks": checks})
        with connected(raylets.address):
            summary = score(
                ScoreRequest(root=root, config=config, measures=("duplicates", "leaks"), examine=examine)
            )
        assert {"duplicates": 60, "leaks": 60} == summary.measured
        found[name] = [row["checks"] for row in with_scores(root, rows(root, "contexts"))]

    assert 60 == examined
    assert found["alone"] == found["spread"]
    assert any("near_duplicate" in one for one in found["alone"])
    assert any("contaminated" in one for one in found["alone"])
