"""`streamsyn simulate`: serve a simulated SGLang."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from streamsyn.cli.options import examples
from streamsyn.errors import ConfigError
from streamsyn.simulator.settings import Fault, SimulatorConfig

_DEFAULTS = {entry.name: entry.default for entry in dataclasses.fields(SimulatorConfig)}


class _FaultRate(click.ParamType[tuple[str, float]]):
    """A kind of fault and its rate, from 0 to 1."""

    name = "KIND=RATE"

    def convert(
        self, value: Any, _param: click.Parameter | None, _ctx: click.Context | None
    ) -> tuple[str, float]:
        kind, equals, rate = str(value).partition("=")
        if not equals:
            raise click.UsageError(f"--fault {value!r}: expected KIND=RATE")
        try:
            return kind, float(rate)
        except ValueError:
            raise click.UsageError(
                f"--fault {value!r}: invalid rate {rate!r}; expected a number from 0 to 1"
            ) from None


@click.command(
    epilog=f"Kinds of faults: {', '.join(Fault)}.\n\n"
    + examples(
        "streamsyn simulate --port 30001",
        "streamsyn simulate --cost-model h100 --fault reset=0.01 --fault http_500=0.01",
    )
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=30000,
    show_default=True,
    help="Port to listen on; 0 picks a free one.",
)
@click.option("--model", default=_DEFAULTS["model"], show_default=True, help="Model name to report.")
@click.option(
    "--cost-model",
    default=_DEFAULTS["cost_model"],
    show_default=True,
    help="plain: requests do not slow each other down. cpu, h100: continuous batching at their speed.",
)
@click.option("--slots", type=int, help="Maximum running requests.  [default: 256, or the cost model's]")
@click.option(
    "--queue-limit", type=int, help="Maximum queued requests; others get a 503.  [default: no limit]"
)
@click.option(
    "--dp-size",
    default=_DEFAULTS["dp_size"],
    show_default=True,
    help="Data-parallel ranks, each with its own slots, queue and cache.",
)
@click.option(
    "--schedule-policy",
    default=_DEFAULTS["schedule_policy"],
    show_default=True,
    help="Order of queued requests with batching: fcfs, or lpm (longest prefix match).",
)
@click.option(
    "--max-prefill-tokens",
    type=int,
    help="Maximum prompt tokens per prefill batch.  [default: the cost model's]",
)
@click.option(
    "--chunked-prefill-size",
    type=int,
    help="Maximum prompt tokens per prefill chunk.  [default: the cost model's]",
)
@click.option(
    "--speed", default=_DEFAULTS["speed"], show_default=True, help="Speed factor; 0.5 is half as fast."
)
@click.option(
    "--latency-ms",
    default=_DEFAULTS["latency_ms"],
    show_default=True,
    help="Milliseconds to the first token.",
)
@click.option(
    "--jitter-ms",
    default=_DEFAULTS["jitter_ms"],
    show_default=True,
    help="Random variation of the latency in milliseconds.",
)
@click.option(
    "--ms-per-token",
    default=_DEFAULTS["ms_per_token"],
    show_default=True,
    help="Milliseconds per further token.",
)
@click.option("--words", default=_DEFAULTS["words"], show_default=True, help="Words per answer.")
@click.option(
    "--faithful",
    default=_DEFAULTS["faithful"],
    show_default=True,
    help="Fraction of answers that contain the gold answer.",
)
@click.option(
    "--context-tokens",
    default=_DEFAULTS["context_tokens"],
    show_default=True,
    help="Context length in tokens.",
)
@click.option(
    "--keep-alive-s",
    default=_DEFAULTS["keep_alive_s"],
    show_default=True,
    help="Seconds until an idle connection is closed.",
)
@click.option(
    "--cache-tokens",
    type=int,
    help="Tokens in the prefix cache, or in the KV pool with batching; 0 is no caching.  "
    "[default: 500000, or the cost model's]",
)
@click.option(
    "--cache-report/--no-cache-report",
    default=_DEFAULTS["cache_report"],
    show_default=True,
    help="Report cached tokens, as with --enable-cache-report.",
)
@click.option(
    "--tokenizer-workers",
    default=_DEFAULTS["tokenizer_workers"],
    show_default=True,
    help="Tokenizer workers; with 1 an abort needs the exact rid.",
)
@click.option(
    "--seed", default=_DEFAULTS["seed"], show_default=True, help="Seed of texts, jitter and faults."
)
@click.option("--load-s", default=_DEFAULTS["load_s"], show_default=True, help="Seconds to load new weights.")
@click.option("--api-key", help="API key to require.  [default: none]")
@click.option("--die-after", type=int, help="Kill the process after this many requests.")
@click.option(
    "--fault",
    "faults",
    type=_FaultRate(),
    multiple=True,
    help="Fraction of requests that fail in this way. Repeatable.",
)
@click.option(
    "--timeline",
    type=click.Path(dir_okay=False, path_type=Path),
    help="TOML file with timed events: outages, slow phases, faults.  [default: none]",
)
def simulate(
    host: str, port: int, faults: tuple[tuple[str, float], ...], timeline: Path | None, **options: Any
) -> None:
    """Serve a simulated SGLang on CPU: its wire protocol, without a model.

    For tests, for benchmarks and for planning a run. Texts are plausible prose, a token is four characters,
    and shared prefixes are cached as in the radix cache. With a cost model other than plain, requests are
    batched as by SGLang's scheduler. GET /simulator/stats returns counters.
    """
    from streamsyn.simulator.app import serve
    from streamsyn.simulator.timeline import load_timeline

    try:
        rates: dict[str, float] = {}
        for kind, rate in faults:
            rates[kind] = rates.get(kind, 0.0) + rate
        played = load_timeline(timeline) if timeline is not None else None
        serve(SimulatorConfig(faults=rates, **options), host, port, timeline=played)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
