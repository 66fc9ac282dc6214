"""`streamsyn bench`: what it prints and writes, and its exit codes."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner, Result

from streamsyn.bench.measured_run import RunToMeasure
from streamsyn.bench.measurement import Load
from streamsyn.bench.series import repeated
from streamsyn.cli.main import cli
from streamsyn.config.loading import load
from streamsyn.errors import ConfigError
from streamsyn.simulator.app import running
from streamsyn.simulator.settings import SimulatorConfig

Bench = Callable[..., Result]
SHORT = ("--warmup-s", "1", "--duration-s", "5", "--set", "recipe.target_words=100")
SIMULATED = (*SHORT, "--simulate", "1xh100:slots=4", "--cap", "4", "--set", "checks.max_repetition=1.0")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs the command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(cli, ["bench", *arguments])

    return invoke


def mistake(result: Result) -> str:
    """The text of a mistake that ends the command with exit code 2."""
    error: Any = result.exception
    if isinstance(error, SystemExit):
        assert 2 == error.code, result.output
        return result.output
    assert isinstance(error, ConfigError), result.output
    return str(error)


def test_a_simulated_fleet_is_measured_and_planned(bench: Bench, tmp_path: Path) -> None:
    """Only the reports are left; bench.json goes to stdout."""
    result = bench(*SIMULATED, "--price", "3 (https://prices.example)", "--out", "out", "--json")
    report = orjson.loads(result.stdout)

    assert 0 == result.exit_code
    assert report == orjson.loads((tmp_path / "out" / "bench.json").read_bytes())
    assert "repeats" == report["kind"]
    assert report["is_complete"]
    assert [1.0, 6.0] == pytest.approx(report["runs"][0]["measured"], abs=0.01)
    assert report["runs"][0]["figures"]["useful_tokens_per_s"] > 0
    assert 3.0 == report["plan"]["price_a_gpu_hour"]
    assert 12 == report["plan"]["drafts"]  # the packaged seeds
    export = orjson.loads((tmp_path / "out" / "profile_export_aiperf.json").read_bytes())
    assert export["output_token_throughput"]["avg"] > 0
    assert ["out"] == [path.name for path in tmp_path.iterdir()]
    for text in ("useful tokens/s", "GPU hours", "https://prices.example", "the seeds ran out"):
        assert text in result.stderr


def test_a_window_without_an_answer_has_no_figures_of_requests(bench: Bench) -> None:
    """The terminal says so in place of zeros."""
    result = bench(*SIMULATED, "--warmup-s", "0", "--duration-s", "0.3")
    assert "no request was answered in this window" in result.output
    assert "ms a request" not in result.output


def test_logs_for_programs_are_one_object_a_line(bench: Bench) -> None:
    """Progress included; stdout has bench.json alone."""
    result = bench(*SIMULATED, "--log-json", "--json", "--out", "out")
    events = [orjson.loads(line) for line in result.stderr.splitlines()]

    assert 0 == result.exit_code
    assert "bench.progress" in {event["event"] for event in events}
    assert orjson.loads(result.stdout)["is_complete"]


def test_a_sweep_has_a_point_for_each_cap(bench: Bench, tmp_path: Path) -> None:
    """And the run at the knee stands for all."""
    result = bench(*SHORT, "--simulate", "1xh100:slots=4", "--sweep", "1,2,4,8,16", "--out", "out")
    report = orjson.loads((tmp_path / "out" / "bench.json").read_bytes())

    assert 0 == result.exit_code, result.output
    assert [1, 2, 4, 8, 16] == [point["load"] for point in report["sweep"]["points"]]
    assert 4 == report["sweep"]["knee"]["point"]["load"]
    assert 4 == report["runs"][report["typical_run"]]["load"]["cap"]
    assert "knee at cap 4" in result.stdout


def test_a_regression_has_an_exit_code_of_its_own(bench: Bench) -> None:
    """Half of the speed; the other way round it is none."""
    fast, slow = (*SIMULATED, "--out", "fast"), (*SHORT, "--cap", "4", "--out", "slow")
    assert 0 == bench(*fast).exit_code
    slower = ("--simulate", "1xh100:slots=4,speed=0.5", "--set", "checks.max_repetition=1.0")
    assert 0 == bench(*slow, *slower).exit_code
    worse = bench("--compare", "fast/bench.json", "slow/bench.json")
    better = bench("--compare", "slow/bench.json", "fast/bench.json", "--json")

    assert 4 == worse.exit_code
    assert "regression: useful tokens/s" in worse.stdout
    assert 0 == better.exit_code
    assert not orjson.loads(better.stdout)["is_regression"]


def test_servers_that_cannot_be_reached_leave_no_reports(bench: Bench, tmp_path: Path) -> None:
    """As a run, it ends with 75."""
    result = bench("--server", "http://127.0.0.1:9", "--set", "fleet.give_up_s=0.5", "--out", "out")

    assert 75 == result.exit_code
    assert "http://127.0.0.1:9" in result.stderr
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "no server: pass --server URL"),
        (["--simulate", "2xh100", "--server", "http://a:1"], "--simulate and --server"),
        (["--simulate", "2xh200"], "h200"),
        (["--cap", "0", "--simulate", "1xh100"], "neither auto nor a whole number"),
        (["--sweep", "8,x", "--simulate", "1xh100"], "not a list of whole numbers"),
        (["--sweep", "8", "--rate", "2", "--simulate", "1xh100"], "--rate and --sweep"),
        (["--price", "2", "--server", "http://a:1"], "--price needs --simulate"),
        (["--goodput", "latency:5", "--simulate", "1xh100"], "unknown latency 'latency'"),
        (["--seeds", "nowhere.jsonl", "--simulate", "1xh100"], "nowhere.jsonl"),
        (["--replay", "nowhere", "--server", "http://a:1"], "nowhere"),
        (["--compare", "a.json", "b.json"], "a.json"),
        (["--simulate", "1xh100", "--out", "/dev/null/out"], "--out /dev/null/out"),
    ],
)
def test_a_mistake_is_refused(bench: Bench, tmp_path: Path, arguments: list[str], text: str) -> None:
    """It names the option; nothing is measured or written."""
    assert text in mistake(bench(*arguments))
    assert [] == list(tmp_path.iterdir())


async def test_real_connections_are_measured_in_real_time(tmp_path: Path) -> None:
    """With the lag of the event loop, which virtual time does not have; a repeat has seeds of its own."""
    seeds = tmp_path / "seeds.jsonl"
    rows = [{"id": str(n), "instruction": f"Who was {n}?", "answer": "Nobody."} for n in range(2000)]
    seeds.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    async with running(SimulatorConfig(latency_ms=20.0)) as server:
        settings = {
            "seeds.sources": [{"path": str(seeds)}],
            "fleet.servers": [server.url],
            "run.queue_size": 1,
            "seeds.group_window": 0,
        }
        asked = RunToMeasure(
            config=load(None, settings.items()),
            load=Load(cap=4, warmup_s=0.1, duration_s=0.5),
            handles_signals=False,
        )
        run, second = await asyncio.to_thread(repeated, asked, 2)

    assert run.is_complete
    assert run.measured.seconds > 0.2
    assert {draft.seed_id for draft in run.drafts}.isdisjoint(draft.seed_id for draft in second.drafts)
    assert any(tick.loop_lag_s is not None for tick in run.ticks)
    assert run.ticks[-1].client_cpu_s > 0
    assert not run.is_simulated
    assert 0.02 <= min(request.server_s for request in run.requests)
