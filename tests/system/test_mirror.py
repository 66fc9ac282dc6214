"""A whole run with `sink.mirror`: at its end the mirror is a run directory like its own."""

from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest

from streamsyn.config.loading import load
from streamsyn.errors import ConfigError
from streamsyn.export.export_request import ExportRequest
from streamsyn.export.export_run import export
from streamsyn.pipeline.request import RunRequest
from streamsyn.pipeline.run import run
from streamsyn.pipeline.summary import RunSummary
from streamsyn.pipeline.verify import verify
from streamsyn.simulator.in_process import InProcessServers
from streamsyn.simulator.settings import SimulatorConfig
from streamsyn.simulator.simulation import Simulation
from tests.builders import sealed_bytes
from tests.export.support import tree


def played(out: Path, mirror: str, seeds: int) -> RunSummary:
    """A run over simulated servers in this process."""
    path = out.parent / "seeds.jsonl"
    lines = [{"instruction": f"Who kept light {n}?", "answer": f"Keeper {n * 7919}."} for n in range(seeds)]
    path.write_bytes(b"\n".join(map(orjson.dumps, lines)))
    url = "http://gpu:30000"
    servers = InProcessServers({url: Simulation(SimulatorConfig(cost_model="h100", slots=32))}, {})
    settings: list[tuple[str, Any]] = [
        ("seeds.sources", [{"path": str(path)}]),
        ("fleet.servers", [url]),
        ("assembly.contexts_per_sample", 3),
        ("sink.shard_bytes", 50_000),
        ("sink.mirror", mirror),
    ]
    request = RunRequest(
        config=load(None, settings),
        out=out,
        connect=servers.connect,
        runner=servers.run,
        rng=Random(0),
        show_progress=False,
    )
    return run(request)


def test_a_run_and_its_mirror_are_the_same(tmp_path: Path) -> None:
    """Sealed bytes, soundness and what is exported of them; also after the run went on with more seeds."""
    out, far = tmp_path / "out", tmp_path / "far"
    for seeds in (60, 90):
        assert seeds == played(out, f"file://{far}", seeds).contexts
        assert sealed_bytes(out) == sealed_bytes(far)
        assert ([], []) == (verify(far)[0], verify(far)[1].notes)
    for root in (out, far):
        export(ExportRequest(root=root, to=str(tmp_path / f"of-{root.name}")))

    assert tree(tmp_path / "of-out") == tree(tmp_path / "of-far")
    assert len(sealed_bytes(far)) > 8


def test_a_mirror_that_cannot_be_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    """One line; the directory is let go of."""
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"sink\.mirror: nowhere://far cannot be used"):
            played(tmp_path / "out", "nowhere://far", 3)
    assert 3 == played(tmp_path / "out", str(tmp_path / "far"), 3).contexts
