"""The files that `streamsyn bench` writes: bench.json, AIPerf's exports and one page.

`bench.json` has the figures of every run, so that two of them can be compared with their noise.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import orjson

import streamsyn
from streamsyn.bench.aiperf_export import (
    FILE_NAME,
    RECORDS_NAME,
    aiperf_export,
    aiperf_metrics,
    aiperf_records,
)
from streamsyn.bench.bench_page import FILE_NAME as PAGE_NAME
from streamsyn.bench.bench_page import bench_page
from streamsyn.bench.compare import noise
from streamsyn.bench.figures import figures
from streamsyn.bench.limits import verdict
from streamsyn.bench.measurement import Interval, Measurement
from streamsyn.bench.series import (
    CONFIDENCE,
    Benchmark,
    MedianInterval,
    knee,
    saturation,
    sweep_points,
    throughput_interval,
)
from streamsyn.io.durable import make_folder, write_whole

FORMAT: Final = 1
"""Version of `bench.json`; a new one when a field changes its meaning or goes."""
BENCH_JSON: Final = "bench.json"


def bench_json(benchmark: Benchmark) -> dict[str, Any]:
    """Return the content of `bench.json`."""
    runs = [_run_json(run) for run in benchmark.runs]
    return {
        "format": FORMAT,
        "streamsyn_version": streamsyn.__version__,
        "kind": benchmark.kind,
        "created_at": benchmark.runs[0].started_at,
        "is_complete": all(run.is_complete for run in benchmark.runs),
        "asked": benchmark.asked,
        "throughput": _interval_json(throughput_interval(benchmark.runs))
        if benchmark.kind == "repeats"
        else None,
        "sweep": _sweep_json(benchmark.runs) if benchmark.kind == "sweep" else None,
        "plan": None if benchmark.plan is None else benchmark.plan.as_dict(),
        "verdict": _verdict_json(benchmark.typical),
        "typical_run": next(n for n, run in enumerate(benchmark.runs) if run is benchmark.typical),
        "runs": runs,
    }


def _run_json(run: Measurement) -> dict[str, Any]:
    found = figures(run)
    return {
        "load": asdict(run.load),
        "started_at": run.started_at,
        "models": list(run.models),
        "gpus": run.gpus,
        "is_simulated": run.is_simulated,
        "is_complete": run.is_complete,
        "stopped": run.stopped,
        "warm_up": _bounds(run.warm_up),
        "measured": _bounds(run.measured),
        "steady": None if run.steady is None else _bounds(run.steady),
        "drain": _bounds(run.drain),
        "seeds": run.seeds,
        "repeats": run.repeats,
        "requests": len(run.requests),
        "capacity_tokens_per_s": run.capacity_tokens_per_s,
        "replayed": None if run.replayed is None else asdict(run.replayed),
        "warnings": list(run.warnings),
        "aiperf": aiperf_metrics(run),
        "figures": asdict(found),
        "verdict": _verdict_json(run),
        "noise": noise(run),
    }


def _verdict_json(run: Measurement) -> dict[str, Any]:
    return asdict(verdict(run, figures(run)))


def _bounds(interval: Interval) -> list[float]:
    return [interval.begins_at, interval.ends_at]


def _interval_json(interval: MedianInterval) -> dict[str, Any]:
    return {
        "metric": "useful_tokens_per_s",
        "median": interval.median,
        "confidence": CONFIDENCE,
        "low": interval.low,
        "high": interval.high,
        "width": interval.width,
        "is_narrow": interval.is_narrow,
    }


def _sweep_json(runs: Sequence[Measurement]) -> dict[str, Any]:
    points = sweep_points(runs)
    found, saturated = knee(points), saturation(points)
    return {
        "points": [asdict(point) for point in points],
        "knee": None if found is None else asdict(found),
        "saturation": None if saturated is None else asdict(saturated),
    }


def write_reports(benchmark: Benchmark, folder: Path) -> list[Path]:
    """Write the reports into `folder`, which is made if need be, and return their paths. Blocks.

    Raises:
        OSError: The folder cannot be written.
    """
    make_folder(folder)
    typical = benchmark.typical
    servers = sorted({server.server for tick in typical.ticks for server in tick.servers})
    export = aiperf_export(
        typical,
        servers,
        version=streamsyn.__version__,
        benchmark_id=time.strftime("streamsyn-%Y%m%d-%H%M%S", time.gmtime(typical.started_at)),
    )
    contents = {
        PAGE_NAME: bench_page(benchmark),
        BENCH_JSON: orjson.dumps(bench_json(benchmark), option=orjson.OPT_INDENT_2) + b"\n",
        FILE_NAME: orjson.dumps(export, option=orjson.OPT_INDENT_2) + b"\n",
        RECORDS_NAME: b"".join(orjson.dumps(row) + b"\n" for row in aiperf_records(typical)),
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
    return [folder / name for name in contents]
