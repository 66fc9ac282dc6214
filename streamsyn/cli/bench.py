"""`streamsyn bench`: measure the throughput of a fleet on this workload."""

import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from streamsyn.cli.exits import EXIT_OTHER, EXIT_REGRESSION, EXIT_REJECTS, EXIT_STOPPED, fail
from streamsyn.cli.options import CLUSTER, LOG_JSON, SERVER, SETTINGS, examples, resolve, with_options
from streamsyn.errors import ConfigError
from streamsyn.plain_text import visible

if TYPE_CHECKING:
    from streamsyn.bench.measured_run import RunToMeasure
    from streamsyn.bench.measurement import Measurement
    from streamsyn.bench.plan import SimulatedFleet
    from streamsyn.bench.series import Benchmark
    from streamsyn.config.loading import Config

_TIME_LIMIT_S, _SIMULATED_LIMIT_S = 900.0, 86_400.0
_LATENCIES = ("request_latency", "time_to_first_token", "inter_token_latency")


class _AutoOr(click.ParamType[Any]):
    """`auto`, or a whole number from 1 on."""

    name = "auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto" or isinstance(value, int):
            return value
        if not (str(value).isdecimal() and int(value) >= 1):
            self.fail(f"{value!r} is neither auto nor a whole number from 1 on", param, ctx)
        return int(value)


class _Caps(click.ParamType[Any]):
    """Caps with commas between them, or `auto`."""

    name = "auto|N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto" or isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() and int(part) >= 1 for part in parts):
            self.fail(f"{value!r} is not a list of whole numbers from 1 on, such as 8,16,32", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


class _Objective(click.ParamType[tuple[str, float]]):
    """The name of a latency and the longest time for it in milliseconds."""

    name = "NAME:MS"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        name, _, number = str(value).partition(":")
        if name not in _LATENCIES:
            self.fail(f"{value!r}: unknown latency {name!r}; known: {', '.join(_LATENCIES)}", param, ctx)
        try:
            return name, float(number)
        except ValueError:
            self.fail(f"{value!r}: {number!r} is not a number of milliseconds", param, ctx)


@click.command(
    epilog=examples(
        "streamsyn bench --server http://gpu-1:30000 --seeds pairs.jsonl",
        "streamsyn bench run.toml --server http://gpu-1:30000 --sweep 32,64,128,256,512 --out bench/knee",
        "streamsyn bench run.toml --simulate 64xh100 --seeds pairs.jsonl --price 2.50",
    )
)
@click.argument("config", required=False, type=click.Path(path_type=Path, dir_okay=False))
@SERVER
@click.option(
    "--seeds",
    multiple=True,
    metavar="PATH",
    help="As for run. Repeatable.  [default: the packaged examples]",
)
@click.option(
    "--cap",
    type=_AutoOr(),
    metavar="auto|N",
    default="auto",
    show_default=True,
    help="Requests in flight per server.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="R",
    help="Begin R drafts/s at random times, whatever is in flight (open loop).",
)
@click.option(
    "--sweep",
    type=_Caps(),
    metavar="[N,N,...]",
    is_flag=False,
    flag_value="auto",
    help="Measure with several caps: those given, or doubled until throughput grows no more.",
)
@click.option("--with-log", is_flag=True, help="Include the durable log and assembly; the log is deleted.")
@click.option("--replay", metavar="DIR", type=click.Path(path_type=Path), help="Send the requests of a run.")
@click.option("--simulate", metavar="NxMODEL", help="Simulate the servers in virtual time, such as 64xh100.")
@click.option(
    "--warmup-s",
    type=click.FloatRange(min=0),
    help="Seconds of warm-up.  [default: until the load is steady]",
)
@click.option(
    "--duration-s",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds to measure.  [default: by the length of requests]",
)
@click.option(
    "--time-limit-s",
    type=click.FloatRange(min=1),
    help="Maximum seconds of all runs together.  [default: 900; with --simulate 86400 virtual ones]",
)
@click.option(
    "--repeats",
    type=_AutoOr(),
    metavar="auto|N",
    help="Runs; auto: until the confidence interval of the median is under 3 %.  [default: auto; with "
    "--replay or --simulate 1]",
)
@click.option(
    "--goodput",
    type=_Objective(),
    multiple=True,
    help=f"Count requests within this latency: {', '.join(_LATENCIES)}. Repeatable.",
)
@click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="GPUs.  [default: one per server]")
@click.option("--price", metavar="DOLLARS", help="Price of a GPU for an hour, such as '2.50 (URL)'.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Reports.  [default: bench-DATE-TIME]"
)
@click.option("--json", "as_json", is_flag=True, help="Write bench.json, or the comparison, to stdout.")
@click.option(
    "--compare",
    nargs=2,
    metavar="A.json B.json",
    type=click.Path(path_type=Path),
    help="Compare two bench.json instead; exit code 4 if B is worse.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=0.05,
    show_default=True,
    help="For --compare: what B may be worse by, as a fraction.",
)
@with_options(CLUSTER)
@SETTINGS
@LOG_JSON
def bench(**given: Any) -> None:
    """Measure the throughput of a fleet on this workload, and find what limits it.

    Sends the recipe's real requests and keeps nothing but reports: bench.json, profile_export_aiperf.json in
    AIPerf's format, and a page. Ctrl-C ends it with the results so far.
    """
    if given["compare"]:
        _compare(given)
        return
    _bench(given)


def _compare(given: dict[str, Any]) -> None:
    """Print the comparison of two benchmarks, and exit with EXIT_REGRESSION if the second is worse."""
    from streamsyn.bench.compare import compare

    before, now = given["compare"]
    found = compare(before, now, given["tolerance"])
    for line in found.lines():
        click.echo(visible(line), err=given["as_json"])
    if given["as_json"]:
        _print_json(found.as_dict())
    if found.regressions:
        sys.exit(EXIT_REGRESSION)


def _print_json(value: dict[str, Any]) -> None:
    import orjson

    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2))


def _bench(given: dict[str, Any]) -> None:
    """Measure, and write the reports."""
    import logging

    from streamsyn.bench.console import console_lines
    from streamsyn.bench.reports import bench_json, write_reports
    from streamsyn.telemetry import configure_logs

    configure_logs(as_json=given["log_json"], level=logging.INFO if given["log_json"] else logging.WARNING)
    _refuse_contradictions(given)
    out = given["out"] or Path(time.strftime("bench-%Y%m%d-%H%M%S"))
    _check_writable(out)
    benchmark = _benchmark(given, out)
    last = benchmark.runs[-1]
    if not any(run.requests for run in benchmark.runs):
        fail(f"no request was answered: {last.stopped or 'the time was too short'}", _exit_code(last))
    if not (given["as_json"] and given["log_json"]):
        for line in console_lines(benchmark):
            click.echo(visible(line), err=given["as_json"])
    try:
        paths = write_reports(benchmark, out)
    except OSError as error:
        fail(f"--out {out} cannot be written: {error}", EXIT_OTHER)
    _tell(given, f"reports: {', '.join(map(str, paths))}")
    if given["as_json"]:
        _print_json(bench_json(benchmark))
    if not last.is_complete:
        sys.exit(_exit_code(last))


def _check_writable(out: Path) -> None:
    """Refuse an --out that the reports could not be written to, before anything is measured."""
    folder = next(one for one in (out.absolute(), *out.absolute().parents) if one.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ConfigError(f"--out {out}: {folder} is not a directory that can be written to")


def _tell(given: dict[str, Any], text: str) -> None:
    """Print what the command is doing to stderr, or log it as bench.progress with --log-json."""
    if given["log_json"]:
        import structlog

        structlog.get_logger().info("bench.progress", text=text)
    else:
        click.echo(f"{time.strftime('%H:%M:%S')} {visible(text)}", err=True)


def _exit_code(stopped: "Measurement") -> int:
    return EXIT_REJECTS if stopped.has_too_many_rejects else EXIT_STOPPED


def _refuse_contradictions(given: dict[str, Any]) -> None:
    """Refuse options that exclude each other."""
    for one, other in (
        ("simulate", "server"),
        ("rate", "sweep"),
        ("replay", "seeds"),
        ("sweep", "repeats"),
    ):
        if _is_given(given[one]) and _is_given(given[other]):
            raise ConfigError(f"--{one} and --{other.replace('_', '-')} cannot be combined")
    if given["price"] is not None and given["simulate"] is None:
        raise ConfigError("--price needs --simulate NxMODEL: it is for planning a fleet")
    if given["sweep"] is not None and given["cap"] != "auto":
        raise ConfigError("--sweep and --cap cannot be combined: a sweep sets the caps")


def _is_given(value: Any) -> bool:
    return value is not None and value is not False and value != ()


def _benchmark(given: dict[str, Any], out: Path) -> "Benchmark":
    """Measure, and plan if the servers are simulated."""
    from importlib.resources import as_file, files

    from streamsyn.bench.plan import parse_price, plan
    from streamsyn.bench.series import Benchmark

    price = None if given["price"] is None else parse_price(given["price"])
    with as_file(files("streamsyn") / "data" / "seeds") as packaged:
        config = resolve(given, None)
        if not config.seeds.sources and given["replay"] is None:
            config = resolve({**given, "seeds": (str(packaged),)}, None)
        fleet = None
        if given["simulate"] is not None:
            from streamsyn.bench.plan import simulated_fleet

            fleet = simulated_fleet(given["simulate"], None if given["replay"] else config.recipe)
            if given["replay"] and fleet.share < 1:
                raise ConfigError("--replay needs the whole fleet: leave out the sample of --simulate")
            config = resolve({**given, "server": fleet.urls, "seeds": _paths(config)}, None)
        to_measure = _to_measure(given, config, fleet, out)
        runs = _measured(given, to_measure)
        kind: Literal["repeats", "sweep"] = "repeats" if given["sweep"] is None else "sweep"
        benchmark = Benchmark(kind=kind, runs=runs, asked=_asked(given, config))
        if fleet is None:
            return benchmark
        typical = benchmark.typical
        drafts = len(typical.drafts) if given["replay"] else _drafts(config)
        to_measure = replace(to_measure, load=typical.load)
        of_fleet = plan(to_measure, typical, drafts, fleet.assumptions, price, fleet.share)
        return replace(benchmark, plan=of_fleet)


def _paths(config: "Config") -> tuple[str, ...]:
    return tuple(source.path for source in config.seeds.sources)


def _to_measure(
    given: dict[str, Any], config: "Config", fleet: "SimulatedFleet | None", out: Path
) -> "RunToMeasure":
    from streamsyn.bench.measured_run import RunToMeasure
    from streamsyn.bench.measurement import Load

    if given["with_log"]:
        out.mkdir(parents=True, exist_ok=True)  # the log belongs on the disk of --out
    load = Load(
        cap=given["cap"],
        rate=given["rate"],
        warmup_s=given["warmup_s"],
        duration_s=given["duration_s"],
        with_log=given["with_log"],
        slos=dict(given["goodput"]),
    )
    return RunToMeasure(
        config=config,
        load=load,
        limit_s=given["time_limit_s"] or (_TIME_LIMIT_S if fleet is None else _SIMULATED_LIMIT_S),
        gpus=given["gpus"],
        folder=out,
        simulated=None if fleet is None else fleet.start,
        replay=given["replay"],
        on_phase=partial(_tell, given),
    )


def _measured(given: dict[str, Any], asked: "RunToMeasure") -> list["Measurement"]:
    """Measure; an interrupt between two runs ends it with those so far."""
    from streamsyn.bench.figures import figures
    from streamsyn.bench.kept_servers import kept_servers
    from streamsyn.bench.series import repeated, swept

    if asked.simulated is None and asked.kept is None and asked.config.cluster.address is not None:
        with kept_servers(asked.config.cluster) as kept:
            return _measured(given, replace(asked, kept=kept))
    runs: list[Measurement] = []

    def on_measured(run: "Measurement") -> None:
        runs.append(run)
        rate = figures(run).useful_tokens_per_s
        cap = f", cap {run.load.cap}" if given["sweep"] else ""
        _tell(given, f"run {len(runs)}{cap}: {rate:,.0f} useful tokens/s")

    try:
        if given["sweep"] is not None:
            swept(asked, () if given["sweep"] == "auto" else given["sweep"], on_measured)
        else:
            once = given["replay"] is not None or given["simulate"] is not None
            repeats: int | Literal["auto"] = given["repeats"] or (1 if once else "auto")
            repeated(asked, None if repeats == "auto" else repeats, on_measured)
    except KeyboardInterrupt:
        if not runs:
            raise
    return runs


def _drafts(config: "Config") -> int:
    """Return the number of drafts of the seeds."""
    from streamsyn.recipes.registry import load_recipe
    from streamsyn.records import Seed
    from streamsyn.seeds.reader import SeedReader

    recipe = load_recipe(config.recipe, config.checks)
    reader = SeedReader(
        config.seeds, config.run.seed, spool_folder=None, takes_documents=recipe.takes_documents
    )
    seeds = sum(isinstance(entry, Seed) for batch in reader.batches(lambda _: True) for entry in batch)
    return min(seeds, config.seeds.limit or seeds) * config.recipe.contexts_per_seed


def _asked(given: dict[str, Any], config: "Config") -> dict[str, Any]:
    """Return what was asked for, as JSON values without secrets."""
    from streamsyn.bench.compare import work
    from streamsyn.config.data_paths import shown_url
    from streamsyn.recipes.registry import load_recipe

    recipe = load_recipe(config.recipe, config.checks)
    options = ("cap", "rate", "sweep", "with_log", "simulate", "warmup_s", "duration_s", "time_limit_s")
    return {
        **{name: given[name] for name in options},
        "replay": None if given["replay"] is None else str(given["replay"]),
        "repeats": given["repeats"],
        "gpus": given["gpus"],
        "seeds": [shown_url(path) for path in _paths(config)],
        "recipe": config.recipe.model_dump(mode="json"),
        "work": work(config, recipe.fingerprint(), given["replay"]),
    }
