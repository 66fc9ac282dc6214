"""The page of a benchmark."""

import re
from pathlib import Path

import orjson

from streamsyn.bench.bench_page import bench_page
from streamsyn.bench.measurement import Load, Measurement
from streamsyn.bench.reports import write_reports
from streamsyn.bench.series import Benchmark
from streamsyn.report.charts import Line, lines
from tests.bench.measured import measurement, tick


def page_of(*runs: Measurement, kind: str = "repeats") -> str:
    """The page on runs."""
    assert kind in ("repeats", "sweep")
    return bench_page(Benchmark(kind="sweep" if kind == "sweep" else "repeats", runs=runs, asked={})).decode()


def test_the_page_has_the_verdict_and_every_server() -> None:
    """The verdict with its note comes first, then figures and plots; nothing is loaded from elsewhere."""
    page = page_of(measurement(capacity_tokens_per_s=250.0))
    text = re.sub(r"<[^>]+>", " ", page)

    assert page.index("The servers are the limit") < page.index('id="limits"')
    assert "server_bound" in text
    assert "80% of what the simulator" in " ".join(text.split()).replace("  ", " ")
    assert 6 == page.count('class="line first"'), "tokens, in flight, CPU, lag, and two servers"
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=|url\(|@import|<script", page)


def test_a_stopped_run_and_a_run_without_a_limit() -> None:
    """What is incomplete is marked; servers without load metrics leave the limit open."""
    unknown = {"running": None, "waiting": None, "token_usage": None}
    ticks = [tick(float(at), unknown) for at in range(1, 41)]
    page = page_of(measurement(ticks=ticks, load=Load(cap=8), stopped="stopped by SIGINT"))

    assert "Incomplete: stopped by SIGINT." in page
    assert "No limit was found." in page


def test_a_sweep_and_repeats_are_shown() -> None:
    """A sweep has a bar for each cap, repeats one for each run, with their interval."""
    sweep = page_of(*(measurement(load=Load(cap=cap)) for cap in (4, 8, 16)), kind="sweep")
    repeats = page_of(*(measurement() for _ in range(6)))

    assert ["cap 4", "cap 8", "cap 16"] == re.findall(r"cap \d+(?=\s*<span)", sweep)
    assert "Median of 6 runs: 200 useful tokens/s, 95 % confidence interval 200 to 200" in repeats


def test_unknown_values_are_gaps_in_a_line() -> None:
    """A line begins anew after each gap; a chart without values is left out."""
    drawn = lines([0.0, 1.0, 2.0, 3.0], [Line("one", [1.0, None, 2.0, 2.0], "first")], "t", (1.0, 2.0))

    assert 2 == len(re.findall("M", re.findall(r' d="([^"]*)"', drawn)[0]))
    assert "" == lines([0.0, 1.0], [Line("one", [None, None], "first")], "t", (0.0, 1.0))


def test_the_folder_of_a_benchmark_has_its_four_files(tmp_path: Path) -> None:
    """The typical run's verdict is at the top of bench.json, beside AIPerf's files and the page."""
    benchmark = Benchmark(kind="repeats", runs=[measurement()], asked={})
    paths = write_reports(benchmark, tmp_path / "out")
    found = orjson.loads((tmp_path / "out" / "bench.json").read_bytes())
    records = (tmp_path / "out" / "profile_export.jsonl").read_bytes().splitlines()

    assert {"bench.html", "bench.json", "profile_export.jsonl", "profile_export_aiperf.json"} == {
        path.name for path in paths
    }
    assert ("server_bound", True) == (found["verdict"]["limit"], found["is_complete"])
    assert {"code", "observed", "threshold", "unit", "sample_count", "note"} == set(
        found["verdict"]["warnings"][0]
    )
    assert found["verdict"] == found["runs"][0]["verdict"]
    assert 20 == len(records)
