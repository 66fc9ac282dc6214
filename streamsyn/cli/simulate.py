import dataclasses
from pathlib import Path
from typing import Any

import click

from streamsyn.errors import ConfigError
from streamsyn.simulator.faults import Fault
from streamsyn.simulator.settings import SimulatorConfig

_DEFAULTS = {entry.name: entry.default for entry in dataclasses.fields(SimulatorConfig)}


class _FaultRate(click.ParamType[tuple[str, float]]):
    """KIND=RATE."""

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
            raise click.UsageError(f"--fault {value!r}: {rate!r} is no number") from None


@click.command(epilog=f"Kinds of fault: {', '.join(Fault)}.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=30000,
    show_default=True,
    help="Port to listen at; 0 picks a free one.",
)
@click.option("--model", default=_DEFAULTS["model"], show_default=True, help="Name of the model.")
@click.option(
    "--cost-model",
    default=_DEFAULTS["cost_model"],
    show_default=True,
    help="plain: each request on its own clock; cpu, h100: continuous batching at that machine's costs.",
)
@click.option("--slots", type=int, help="Requests that run at once.  [default: 256, or the cost model's]")
@click.option("--queue-limit", type=int, help="Requests that may wait; beyond it, 503.  [default: no limit]")
@click.option(
    "--schedule-policy",
    default=_DEFAULTS["schedule_policy"],
    show_default=True,
    help="With batching, who of those that wait goes first: fcfs, or lpm (longest cached prefix).",
)
@click.option(
    "--max-prefill-tokens", type=int, help="Prompt tokens in a prefill batch.  [default: the cost model's]"
)
@click.option(
    "--chunked-prefill-size",
    type=int,
    help="Longer prompts are computed in pieces.  [default: the cost model's]",
)
@click.option("--speed", default=_DEFAULTS["speed"], show_default=True, help="0.5: half as fast.")
@click.option(
    "--latency-ms", default=_DEFAULTS["latency_ms"], show_default=True, help="Time to the first token."
)
@click.option(
    "--jitter-ms", default=_DEFAULTS["jitter_ms"], show_default=True, help="Latency varies by this much."
)
@click.option(
    "--ms-per-token", default=_DEFAULTS["ms_per_token"], show_default=True, help="Time a token after it."
)
@click.option("--words", default=_DEFAULTS["words"], show_default=True, help="Length of a text.")
@click.option(
    "--faithful", default=_DEFAULTS["faithful"], show_default=True, help="Share of texts with the answer in."
)
@click.option(
    "--context-tokens", default=_DEFAULTS["context_tokens"], show_default=True, help="Longest prompt."
)
@click.option(
    "--keep-alive-s", default=_DEFAULTS["keep_alive_s"], show_default=True, help="Idle connections close."
)
@click.option(
    "--cache-tokens",
    type=int,
    help="Size of the prefix cache; with batching, of the whole KV pool; 0: no prefix caching.  "
    "[default: 500000, or the cost model's]",
)
@click.option(
    "--tokenizer-workers",
    default=_DEFAULTS["tokenizer_workers"],
    show_default=True,
    help="With 1, aborts need the exact rid.",
)
@click.option("--seed", default=_DEFAULTS["seed"], show_default=True, help="Fixes texts, jitter and faults.")
@click.option(
    "--load-s", default=_DEFAULTS["load_s"], show_default=True, help="Time that other weights take to load."
)
@click.option("--api-key", help="Bearer token to ask for.  [default: none]")
@click.option("--die-after", type=int, help="Die abruptly after this many requests.")
@click.option(
    "--fault",
    "faults",
    type=_FaultRate(),
    multiple=True,
    help="Share of requests that go wrong; may be repeated.",
)
@click.option(
    "--timeline",
    type=click.Path(dir_okay=False, path_type=Path),
    help="TOML file with what happens when: outages, slow phases, faults.  [default: none]",
)
def simulate(
    host: str, port: int, faults: tuple[tuple[str, float], ...], timeline: Path | None, **options: Any
) -> None:
    """Serve a simulated SGLang on CPU: its wire protocol, without a model.

    For tests, for benchmarks and for planning a run. Texts are plausible prose, a token is four characters,
    and shared prefixes are found again as the radix cache would find them. With a cost model other than
    plain, requests are batched as SGLang's scheduler does it and slow each other down. GET /simulator/stats
    counts what came.
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
