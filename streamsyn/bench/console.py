"""The results of `streamsyn bench` as lines for a terminal."""

from collections.abc import Iterator, Sequence

from streamsyn.bench.figures import Figures, figures
from streamsyn.bench.limits import Verdict, verdict
from streamsyn.bench.measurement import Measurement
from streamsyn.bench.series import (
    CONFIDENCE,
    Benchmark,
    MedianInterval,
    knee,
    saturation,
    sweep_points,
    throughput_interval,
)


def console_lines(benchmark: Benchmark) -> Iterator[str]:
    """Yield the results for a terminal."""
    typical = benchmark.typical
    if benchmark.kind == "sweep":
        yield from _sweep_lines(benchmark.runs)
    elif len(benchmark.runs) > 1:
        yield _interval_line(throughput_interval(benchmark.runs), len(benchmark.runs))
    yield from run_lines(typical)
    if benchmark.plan is not None:
        yield from benchmark.plan.lines()


def _interval_line(interval: MedianInterval, runs: int) -> str:
    text = f"median of {runs} runs: {interval.median:,.0f} useful tokens/s"
    if interval.low is None or interval.high is None or interval.width is None:
        return f"{text}; for its {CONFIDENCE:.0%} confidence interval 6 runs are needed"
    return (
        f"{text}, {CONFIDENCE:.0%} confidence interval {interval.low:,.0f} to {interval.high:,.0f} "
        f"({interval.width:.1%})"
    )


def _sweep_lines(runs: Sequence[Measurement]) -> Iterator[str]:
    points = sweep_points(runs)
    yield f"{'cap':>8}{'in flight':>12}{'tokens/s':>12}{'first token':>14}{'request':>12}"
    for point in points:
        first = "" if point.first_token_s is None else f"{point.first_token_s:.2f} s"
        yield (
            f"{point.load:8.0f}{point.in_flight:12,.1f}{point.tokens_per_s:12,.0f}{first:>14}"
            f"{point.latency_s:10.2f} s"
        )
    found, saturated = knee(points), saturation(points)
    if found is None:
        yield "no knee: throughput grows to the end, or there are too few points"
    else:
        yield (
            f"knee at cap {found.point.load:.0f}: {found.point.tokens_per_s:,.0f} tokens/s, "
            f"{found.share_of_peak:.0%} of the peak"
        )
    if saturated is not None:
        yield f"saturated from cap {saturated.load:.0f} on: requests only wait longer"


def run_lines(run: Measurement) -> Iterator[str]:
    """Yield the results of one run for a terminal."""
    found = figures(run)
    yield from _verdict_lines(verdict(run, found))
    yield _window_line(run)
    per_gpu = f" ({found.useful_tokens_per_s_per_gpu:,.0f} a GPU)" if run.gpus > 1 else ""
    yield (
        f"{found.useful_tokens_per_s:,.0f} useful tokens/s{per_gpu} of {found.written_tokens_per_s:,.0f} "
        f"written; {found.contexts_per_s:,.2f} contexts/s"
    )
    if any(one.ended == "ok" and run.window.holds(one.done_at) for one in run.requests):
        yield from _request_lines(found, "; without the simulated servers" if run.is_simulated else "")
    else:
        yield "no request was answered in this window: measure for longer (--duration-s)"
    yield from _share_lines(found)
    if run.repeats:
        yield (
            f"the seeds ran out: {run.repeats:,} of {len(run.drafts):,} drafts repeat one of {run.seeds:,} "
            "seeds, so servers have their prompts in the cache; give more --seeds"
        )
    if run.replayed is not None:
        yield (
            f"the replay took {run.replayed.seconds:,.0f} s; prompt tokens sent for each computed: "
            f"{run.replayed.factor:.2f}, in the recorded run {run.replayed.recorded_factor:.2f}"
        )
        yield from (f"left out: {number} drafts: {why}" for why, number in run.replayed.left_out.items())
        yield from run.replayed.notes
    yield from (f"note: {warning}" for warning in run.warnings)
    if not run.is_complete:
        yield f"incomplete: {run.stopped}"


def _verdict_lines(found: Verdict) -> Iterator[str]:
    yield f"verdict: {found.headline}"
    for warning in found.warnings:
        yield (
            f"  {warning.code}: {warning.observed:,.2f} {warning.unit} (threshold {warning.threshold:g}, "
            f"{warning.sample_count:,} observations)"
        )
        yield f"    {warning.note}"


def _window_line(run: Measurement) -> str:
    window, drained = run.window, run.drain.seconds
    share = f"steady for {window.seconds:.0f} of {run.measured.seconds:.0f} s measured"
    if run.steady is None:
        share = f"no steady state in {run.measured.seconds:.0f} s measured"
    return (
        f"{share}, from {window.begins_at:.0f} s to {window.ends_at:.0f} s; {run.warm_up.seconds:.0f} s of "
        f"warm-up and {drained:.0f} s of drain not counted"
    )


def _request_lines(found: Figures, of_cpu: str) -> Iterator[str]:
    prefix, parts, client = found.prefix_tokens, found.seconds_per_request, found.client
    deducted = [f"{name} {rate:,.0f}" for name, rate in found.deducted_tokens_per_s.items() if rate >= 1]
    if deducted:
        yield f"written in vain, tokens/s: {', '.join(deducted)}"
    if prefix.prompt:
        yield (
            f"prompt tokens: {prefix.planned / prefix.prompt:.0%} planned to be cached, "
            f"{prefix.achieved / prefix.prompt:.0%} were"
            + "".join(
                f", {number / prefix.prompt:.0%} from {tier}"
                for tier, number in (("host", prefix.from_host), ("storage", prefix.from_storage))
                if number
            )
        )
    network = "" if parts.network is None else f"network {1000 * parts.network:,.1f}, "
    yield (
        f"ms a request: queue {1000 * parts.queue:,.1f}, {network}server {1000 * parts.server:,.1f}, "
        f"checks {1000 * parts.checks:,.2f}, disk {1000 * parts.disk:,.2f}"
    )
    lag = (
        "" if client.loop_lag_max_ms is None else f", longest event-loop lag {client.loop_lag_max_ms:,.0f} ms"
    )
    yield f"client CPU: {client.cpu_ms_per_request:,.2f} ms a request{lag}{of_cpu}"


def _share_lines(found: Figures) -> Iterator[str]:
    if found.share_of_capacity is not None:
        yield f"{found.share_of_capacity:.0%} of what the cost model allows"
    if found.share_of_counters is not None:
        yield f"{found.share_of_counters:.0%} of the tokens that the servers' counters show"
    elif found.share_of_reported is not None:
        yield f"{found.share_of_reported:.0%} of the tokens/s that the servers report"
