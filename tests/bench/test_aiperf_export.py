"""The export for AIPerf's tools."""

import json
from pathlib import Path
from typing import Any

import numpy
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsyn.bench.aiperf_export import (
    aiperf_export,
    aiperf_metrics,
    aiperf_records,
    distribution,
)
from streamsyn.bench.measurement import Load
from tests.bench.measured import SERVERS, measurement, request
from tests.examples import examples

SCHEMA = json.loads((Path(__file__).parent / "aiperf_schema.json").read_text("utf-8"))
"""Units and kinds of AIPerf's metrics, and the top-level fields of its export; made from version 0.13.0."""
STATISTICS = {"p1", "p5", "p10", "p25", "p50", "p75", "p90", "p95", "p99", "min", "max", "std", "sum"}


def streamed() -> Any:
    """A measurement with a streamed answer, a failed and a busy try, and an objective."""
    requests = [
        request(0, 10.0, 12.0, first_token_at=10.2),
        request(1, 10.0, 14.0),
        request(2, 10.0, 11.0, ended="error", error="ServerTimeout", completion_tokens=0),
        request(3, 10.0, 11.0, ended="error", error="ServerBusy", completion_tokens=0),
    ]
    load = Load(duration_s=20.0, slos={"request_latency": 3000.0})
    return measurement(requests, outcomes={2: "reject", 3: "unfinished"}, load=load)


def exported(**given: Any) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(
        orjson.dumps(aiperf_export(streamed(), SERVERS, version="1", benchmark_id="b", **given))
    )
    return found


def test_the_export_has_the_recorded_schema() -> None:
    """Every metric is one of AIPerf's, in its unit, with the statistics that AIPerf gives its kind."""
    found = exported()
    metrics = {name: value for name, value in found.items() if isinstance(value, dict) and "unit" in value}

    assert SCHEMA["schema_version"] == found["schema_version"]
    assert {name: SCHEMA["metrics"][name]["unit"] for name in metrics} == {
        name: metric["unit"] for name, metric in metrics.items()
    }
    for name, metric in metrics.items():
        is_distribution = SCHEMA["metrics"][name]["is_distribution"]
        assert {"unit", "avg"} | ({*STATISTICS, "count"} if is_distribution else set()) == set(metric), name
    assert {
        "time_to_first_token",
        "inter_token_latency",
        "request_latency",
        "output_token_throughput",
        "request_throughput",
        "input_sequence_length",
        "output_sequence_length",
        "goodput",
        "overall_usage_prompt_cache_read_pct",
        "benchmark_duration",
    } <= set(metrics)
    assert set(found) - set(metrics) - {"streamsyn_version"} <= set(SCHEMA["fields"])


def test_metrics_of_known_requests() -> None:
    """Latencies in milliseconds, rates per second of the window, errors without backpressure."""
    found = aiperf_metrics(streamed())

    assert pytest.approx(200.0) == found["time_to_first_token"]["avg"]
    assert pytest.approx(1800 / 199) == found["inter_token_latency"]["avg"]
    assert pytest.approx(3000.0) == found["request_latency"]["p50"]
    assert pytest.approx(0.1) == found["request_throughput"]["avg"]
    assert pytest.approx(20.0) == found["output_token_throughput"]["avg"]
    assert pytest.approx(60.0) == found["overall_usage_prompt_cache_read_pct"]["avg"]
    assert pytest.approx(20.0) == found["benchmark_duration"]["avg"]
    assert 1 == found["error_request_count"]["avg"]
    assert 1 == found["good_request_count"]["avg"]
    assert pytest.approx(0.05) == found["goodput"]["avg"]
    assert ["ServerTimeout"] == [row["error"]["type"] for row in aiperf_records(streamed()) if row["error"]]


@examples(100)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_a_distribution_has_numpys_statistics(values: list[float]) -> None:
    """Percentiles are interpolated linearly, and the deviation is that of the population, as in AIPerf."""
    found = distribution(values, "ms")

    assert pytest.approx(float(numpy.std(values)), abs=1e-6) == found["std"]
    assert [found[f"p{share}"] for share in (1, 25, 50, 99)] == pytest.approx(
        [float(numpy.percentile(values, share)) for share in (1, 25, 50, 99)]
    )
    assert (len(values), min(values), max(values)) == (found["count"], found["min"], found["max"])


def test_what_was_stopped_early_says_so() -> None:
    """Tools must not compare a run that was cut short with a whole one."""
    stopped = measurement(stopped="stopped by SIGINT")
    found = aiperf_export(stopped, SERVERS, version="1", benchmark_id="b")

    assert (False, True) == (found["is_complete"], found["was_cancelled"])
    assert "stopped by SIGINT" == found["incomplete_reason"]
    assert exported()["is_complete"]


def test_aiperfs_own_loader_reads_the_export(tmp_path: Path) -> None:
    """`aiperf plot` loads the folder with the class that it uses; its models take every line."""
    loading = pytest.importorskip(
        "aiperf.plot.core.data_loader", reason="AIPerf is not installed (pip install aiperf)"
    )
    models = pytest.importorskip("aiperf.common.models.export_models")
    (tmp_path / "profile_export_aiperf.json").write_bytes(orjson.dumps(exported()))
    lines = [orjson.dumps(row) + b"\n" for row in aiperf_records(streamed())]
    (tmp_path / "profile_export.jsonl").write_bytes(b"".join(lines))

    run = loading.DataLoader().load_run(tmp_path)
    model = models.JsonExportData.model_validate(exported())

    assert 3 == len(run.requests)
    assert ("m", "chat", False) == (
        run.metadata.model,
        run.metadata.endpoint_type,
        run.metadata.was_cancelled,
    )
    assert 200.0 == pytest.approx(run.aggregated["time_to_first_token"]["avg"])
    assert model.goodput.avg == pytest.approx(0.05)
    assert SCHEMA["schema_version"] == model.SCHEMA_VERSION
