"""The options of `--ray`, and what is missing for it."""

import sys
from pathlib import Path

import pytest

from streamsyn.bench.measured_run import RunToMeasure, measure
from streamsyn.bench.measurement import Load
from streamsyn.cli.options import cluster_overrides
from streamsyn.config.command_sections import ClusterSection
from streamsyn.config.loading import load
from streamsyn.errors import ConfigError
from streamsyn.pipeline.setup import on_cluster
from streamsyn.trainer.training_request import TrainRequest


def test_options_set_keys() -> None:
    """Each has a key of the section; what is not given keeps the key's value."""
    given = {"ray": "auto", "model": "m", "replicas": 4, "gpus_per_replica": None, "limit": 3}
    assert [
        ("cluster.address", "auto"),
        ("cluster.model", "m"),
        ("cluster.replicas", 4),
    ] == cluster_overrides(given)
    assert [] == cluster_overrides({"ray": None, "model": None})


def test_options_without_ray() -> None:
    """`--model` alone is most likely meant for the fleet."""
    with pytest.raises(ConfigError, match=r"--gpus-per-replica is for servers that Ray starts"):
        cluster_overrides({"gpus_per_replica": 2})
    with pytest.raises(ConfigError, match=r"needs --ray; .*--set fleet\.model=VALUE"):
        cluster_overrides({"model": "m"})


def test_a_benchmark_needs_no_other_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With `--ray` it goes on to the cluster, here to the lack of Ray, and does not ask for --server."""
    monkeypatch.delitem(sys.modules, "streamsyn.cluster.placing", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    path = tmp_path / "seeds.jsonl"
    path.write_text('{"instruction": "Why?", "answer": "So."}\n')
    overrides = [("seeds.sources", [{"path": str(path)}]), ("cluster", {"address": "auto", "model": "m"})]
    with pytest.raises(ConfigError, match=r"pip install 'streamsyn\[ray\]'"):
        measure(RunToMeasure(config=load(None, overrides), load=Load(cap=1), handles_signals=False))


async def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what to install."""
    monkeypatch.delitem(sys.modules, "streamsyn.cluster.placing", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'streamsyn\[ray\]'"):
        async with on_cluster(ClusterSection(address="auto", model="m")):
            pytest.fail("it was found")


def test_workers_are_checked_before_anything_starts(tmp_path: Path) -> None:
    """The rows of a step must be divisible among each number of workers, and samples reachable for all."""
    from streamsyn.trainer.on_cluster import train_on_cluster

    def why(source: str = "runs/first", **keys: int) -> str:
        config = load(None, [(f"cluster.{key}", value) for key, value in keys.items()])
        request = TrainRequest(config, source, "base", tmp_path)
        with pytest.raises(ConfigError) as caught:
            train_on_cluster(request, as_json=False)
        return str(caught.value)

    assert "8 rows cannot be divided among 3 workers" in why(workers=3)
    assert "each of 2 to 4 workers; use a multiple of 12" in why(workers=2, max_workers=4)
    assert "cluster.max_workers = 1 is less than cluster.workers = 2" in why(workers=2, max_workers=1)
    assert "--from -" in why("-", workers=2)
    request = TrainRequest(load(None, []), "runs/first", "base", tmp_path)
    with pytest.raises(ConfigError, match="--workers is for a training on a Ray cluster: it needs --ray"):
        request.on_cluster(None, workers=2)
