"""Two benchmarks of the same work, side by side."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import orjson
import pytest

from streamsyn.bench.aiperf_export import aiperf_metrics
from streamsyn.bench.compare import compare, noise, work
from streamsyn.bench.figures import figures
from streamsyn.bench.measurement import Load, Measurement
from streamsyn.config.loading import load
from streamsyn.errors import ConfigError
from tests.bench.measured import measurement, request

WORK = {"recipe.target_words": 2000, "seeds": [["seeds.jsonl", 10, "ab"]]}


def measured(speed: float = 1.0, jitter: float = 0.1, seed: int = 0, **given: Any) -> Measurement:
    """A run whose requests are answered `speed` times as fast."""
    rng = Random(seed)
    requests = [
        request(draft, draft * 0.2 / speed, draft * 0.2 / speed + rng.uniform(1 - jitter, 1 + jitter) / speed)
        for draft in range(int(200 * speed))
    ]
    return measurement(requests, **given)


def written(path: Path, runs: Sequence[Measurement], **given: Any) -> Path:
    """A bench.json of runs."""
    bench = {
        "kind": "repeats",
        "is_complete": True,
        "asked": {"work": WORK},
        "typical_run": 0,
        "runs": [
            {
                "load": asdict(run.load),
                "models": run.models,
                "is_complete": True,
                "aiperf": aiperf_metrics(run),
                "figures": asdict(figures(run)),
                "noise": {} if number else noise(run),
            }
            for number, run in enumerate(runs)
        ],
        **given,
    }
    path.write_bytes(orjson.dumps(bench))
    return path


def test_a_slower_fleet_is_a_regression(tmp_path: Path) -> None:
    """By more than the tolerance and by more than noise; a faster one is not."""
    usual, slow = (written(tmp_path / f"{speed}.json", [measured(speed)]) for speed in (1.0, 0.8))

    found = compare(usual, slow, 0.05)

    assert ["useful tokens/s"] == [row.figure.name for row in found.regressions]
    assert pytest.approx(-0.2, abs=0.01) == found.regressions[0].change
    assert [] == compare(usual, slow, 0.25).regressions
    assert [] == compare(slow, usual, 0.05).regressions
    table = "\n".join(found.lines())
    assert "regression: useful tokens/s -19.9%" in table
    assert "request p50, ms" in table
    assert found.as_dict()["is_regression"]


def test_noise_is_not_a_regression(tmp_path: Path) -> None:
    """Runs whose seconds differ much have wide bounds, and equal runs show no change."""
    rng = Random(1)
    bursts = [request(n, at := rng.uniform(0, 40), at + 1) for n in range(60)]
    before = written(tmp_path / "a.json", [measurement(bursts)])
    fewer = [request(n, one.sent_at, one.done_at) for n, one in enumerate(bursts) if n % 7]
    now = written(tmp_path / "b.json", [measurement(fewer)])

    row = compare(before, now, 0.05).rows[0]

    assert row.change < -0.05
    assert (row.verdict, row.is_regression) == ("within noise", False)
    assert {"within noise"} == {row.verdict for row in compare(before, before, 0.0).rows}


def test_bounds_of_several_runs_are_those_of_their_median(tmp_path: Path) -> None:
    """From six runs on at 95 %; of fewer, lowest and highest."""
    runs = [measured(1 + number / 100) for number in range(6)]
    rates = sorted(figures(run).useful_tokens_per_s for run in runs)

    row = compare(
        written(tmp_path / "a.json", runs), written(tmp_path / "b.json", runs[:3]), tolerance=0.05
    ).rows[0]

    assert (median(rates), (rates[0], rates[5])) == (row.before, row.before_bounds)
    assert (rates[1], (rates[0], rates[2])) == (row.now, row.now_bounds)


def test_an_open_loop_is_judged_by_its_latencies(tmp_path: Path) -> None:
    """It sends at its rate, whatever the servers do."""
    rate = Load(rate=10.0)
    quick = written(tmp_path / "a.json", [measured(load=rate)])
    requests = [replace(one, done_at=one.done_at + 0.5) for one in measured().requests]
    slow = written(tmp_path / "b.json", [measurement(requests, load=rate)])

    found = compare(quick, slow, 0.05)

    assert ["request p50, ms", "request p99, ms"] == [row.figure.name for row in found.regressions]


def test_a_short_window_has_no_bounds() -> None:
    """Fewer than five seconds tell nothing about noise."""
    short = replace(measured().measured, ends_at=14.0)

    assert {} == noise(replace(measured(), measured=short, steady=short))


def test_different_work_cannot_be_compared(tmp_path: Path) -> None:
    """The keys are named."""
    usual = written(tmp_path / "a.json", [measured()])
    shorter = written(tmp_path / "b.json", [measured()], asked={"work": WORK | {"recipe.target_words": 500}})
    open_loop = written(tmp_path / "c.json", [measured(load=Load(rate=3.0))])

    with pytest.raises(ConfigError, match=r"different work .*recipe.target_words: 2000 before, 500 now"):
        compare(usual, shorter, 0.05)
    with pytest.raises(ConfigError, match=r"different work .*--rate: None before, 3.0 now"):
        compare(usual, open_loop, 0.05)


def test_other_loads_and_models_are_noted(tmp_path: Path) -> None:
    """They are what one may want to compare."""
    usual = written(tmp_path / "a.json", [measured()])
    fixed = written(tmp_path / "b.json", [measured(load=Load(cap=64), models=["n"])], is_complete=False)

    notes = "\n".join(compare(usual, fixed, 0.05).notes)

    assert "models differ: ['m'] in A, ['n'] in B" in notes
    assert "'cap': 64" in notes
    assert "b.json is incomplete" in notes


@pytest.mark.parametrize("text", ["{", "[1]", '{"runs": []}', '{"schema_version": "1.4"}', None])
def test_what_is_not_a_benchmark_is_refused(tmp_path: Path, text: str | None) -> None:
    """In one line with the file."""
    path, usual = tmp_path / "profile_export_aiperf.json", written(tmp_path / "bench.json", [measured()])
    if text is not None:
        path.write_text(text)

    with pytest.raises(ConfigError, match=str(path)) as raised:
        compare(tmp_path, path, 0.05)  # a folder stands for its bench.json

    assert "\n" not in str(raised.value)
    assert usual.exists()


def test_work_is_the_same_for_copied_seeds_and_other_servers(tmp_path: Path) -> None:
    """What is asked counts, not whom; and the content of seeds, not their folder."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "seeds.jsonl").write_text('{"instruction": "i", "answer": "a"}\n')

    def of(folder: str, **given: Any) -> dict[str, Any]:
        sources = [{"path": str(tmp_path / folder / "seeds.jsonl")}]
        return work(load(None, {"seeds.sources": sources, **given}.items()), {"recipe.prompt": "x"})

    usual = of("one")
    assert usual == of("two", **{"fleet.servers": ["http://elsewhere:1"]})
    assert usual != of("two", **{"recipe.target_words": 7})
    (tmp_path / "two" / "seeds.jsonl").write_text('{"instruction": "i", "answer": "b"}\n')
    assert usual != of("two")
