"""`profile_export_aiperf.json`: the measurement in AIPerf's metrics, names and schema.

    https://github.com/ai-dynamo/aiperf, version 0.13, `aiperf.common.models.export_models.JsonExportData`

Where AIPerf measures from the first request to the last answer, these metrics are of the window of the
measurement: distributions of the requests that were answered in it, rates as in `figures`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import numpy

from streamsyn.bench.figures import BUSY, share_within
from streamsyn.bench.measurement import Measurement, RequestRecord

SCHEMA_VERSION: Final = "1.4"
"""Of AIPerf's export."""
FILE_NAME: Final = "profile_export_aiperf.json"
RECORDS_NAME: Final = "profile_export.jsonl"
"""AIPerf's file of single requests, without which its plots do not load a run."""
Metric = dict[str, str | float | int]
"""A metric in AIPerf's form: `unit` and `avg`; distributions also have p1 to p99, `min`, `max`, `std`,
`count` and `sum`."""
_PERCENTILES: Final = (1, 5, 10, 25, 50, 75, 90, 95, 99)
LATENCIES: Final = ("request_latency", "time_to_first_token", "inter_token_latency")
"""Metrics in milliseconds that a service level objective can bound."""


def distribution(values: Sequence[float], unit: str) -> Metric:
    """Return a metric with all its statistics, percentiles interpolated; there must be values."""
    array = numpy.asarray(values, dtype=float)
    found = numpy.percentile(array, _PERCENTILES)
    return {
        "unit": unit,
        "avg": float(array.mean()),
        **{f"p{percent}": float(value) for percent, value in zip(_PERCENTILES, found, strict=True)},
        "min": float(array.min()),
        "max": float(array.max()),
        "std": float(array.std()),
        "count": len(values),
        "sum": float(array.sum()),
    }


def aiperf_metrics(measurement: Measurement) -> dict[str, Metric]:
    """Return AIPerf's metrics by name; those without a value are left out.

    A full queue (503) and a rate limit (429) are backpressure: they are not counted as errors.
    """
    window = measurement.window
    seconds = max(window.seconds, 1e-9)
    ended = [one for one in measurement.requests if window.holds(one.done_at)]
    answered = [one for one in ended if one.ended == "ok"]
    failed = sum(one.ended == "error" and one.error not in BUSY for one in ended)
    requests, prompt_tokens, tokens = _within(measurement)
    prompt, cached = sum(one.prompt_tokens for one in answered), sum(one.cached_tokens for one in answered)
    scalars = {
        "request_throughput": (requests / seconds, "requests/sec"),
        "output_token_throughput": (tokens / seconds, "tokens/sec"),
        "input_token_throughput": (prompt_tokens / seconds, "tokens/sec"),
        "total_token_throughput": ((prompt_tokens + tokens) / seconds, "tokens/sec"),
        "request_count": (len(answered), "requests"),
        "error_request_count": (failed, "requests"),
        "benchmark_duration": (window.seconds, "sec"),
        "total_isl": (prompt, "tokens"),
        "total_osl": (sum(one.completion_tokens for one in answered), "tokens"),
        "total_usage_prompt_cache_read_tokens": (cached, "tokens"),
    }
    if prompt:
        scalars["overall_usage_prompt_cache_read_pct"] = (100 * cached / prompt, "%")
    if answered or failed:
        scalars["request_error_rate"] = (100 * failed / (len(answered) + failed), "%")
    if slos := measurement.load.slos:
        good = sum(_meets(one, slos) for one in answered)
        scalars["good_request_count"] = (good, "requests")
        scalars["goodput"] = (good / seconds, "requests/sec")
    found: dict[str, Metric] = {name: {"unit": unit, "avg": value} for name, (value, unit) in scalars.items()}
    return found | _distributions(answered)


def _within(measurement: Measurement) -> tuple[float, float, float]:
    """Return requests, prompt tokens and completion tokens of answers, as far as they are in the window."""
    requests = prompts = tokens = 0.0
    for one in measurement.requests:
        if one.ended == "ok" and (share := share_within(one, measurement.window)):
            requests += share
            prompts += share * one.prompt_tokens
            tokens += share * one.completion_tokens
    return requests, prompts, tokens


def _distributions(answered: Sequence[RequestRecord]) -> dict[str, Metric]:
    values: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for one in answered:
        for name, (value, unit) in record_metrics(one).items():
            values[name, unit].append(value)
    return {name: distribution(found, unit) for (name, unit), found in values.items()}


def record_metrics(request: RequestRecord) -> dict[str, tuple[float, str]]:
    """Return AIPerf's metrics of one answered request, as value and unit by name."""
    found: dict[str, tuple[float, str]] = {
        "request_latency": (1000 * request.server_s, "ms"),
        "input_sequence_length": (request.prompt_tokens, "tokens"),
        "output_sequence_length": (request.completion_tokens, "tokens"),
        "usage_prompt_cache_read_tokens": (request.cached_tokens, "tokens"),
    }
    if request.first_token_at is not None:
        found["time_to_first_token"] = (1000 * (request.first_token_at - request.sent_at), "ms")
        if request.completion_tokens > 1:
            decoding_s = request.done_at - request.first_token_at
            found["inter_token_latency"] = (1000 * decoding_s / (request.completion_tokens - 1), "ms")
    return found


def _meets(request: RequestRecord, slos: Mapping[str, float]) -> bool:
    """Whether each latency with an objective was measured and is at most that long."""
    found = record_metrics(request)
    return all(name in found and found[name][0] <= most for name, most in slos.items())


def aiperf_export(
    measurement: Measurement, servers: Sequence[str], *, version: str, benchmark_id: str
) -> dict[str, Any]:
    """Return the content of `profile_export_aiperf.json`.

    Args:
        measurement: What was measured.
        servers: Base URLs, without credentials.
        version: Version of this program; `aiperf_version` stays out, as AIPerf did not make the file.
        benchmark_id: Identifies this benchmark.
    """
    load, window = measurement.load, measurement.window
    phase: dict[str, Any] = {"name": "profiling", "duration": measurement.measured.seconds}
    if load.rate is not None:
        phase |= {"type": "poisson", "rate": load.rate}
    else:
        phase |= {"type": "concurrency", "concurrency": max(1, round(_mean_in_flight(measurement)))}
    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark_id": benchmark_id,
        "streamsyn_version": version,
        "input_config": {
            "models": {"items": [{"name": model} for model in measurement.models or ["unknown"]]},
            "endpoint": {"urls": list(servers), "type": "chat", "streaming": False},
            "datasets": [{"name": "seeds", "type": "synthetic"}],
            "phases": [phase],
        },
        "was_cancelled": not measurement.is_complete,
        "is_complete": measurement.is_complete,
        **({} if measurement.is_complete else {"incomplete_reason": measurement.stopped}),
        "error_summary": _error_summary(measurement),
        "start_time": _clock(measurement.started_at + window.begins_at),
        "end_time": _clock(measurement.started_at + window.ends_at),
        **aiperf_metrics(measurement),
    }


def _mean_in_flight(measurement: Measurement) -> float:
    """Return the mean number of requests in flight at the fleet, within the window."""
    window = measurement.window
    busy_s = sum(share_within(one, window) * one.server_s for one in measurement.requests)
    return busy_s / max(window.seconds, 1e-9)


def _error_summary(measurement: Measurement) -> list[dict[str, Any]]:
    """Return the kinds of errors with their numbers and the message of the first one."""
    failed = [
        one for one in measurement.requests if one.ended == "error" and measurement.window.holds(one.done_at)
    ]
    messages = {one.error: one.error_message or one.error for one in reversed(failed)}
    return [
        {"error_details": {"type": name, "message": messages[name]}, "count": count}
        for name, count in Counter(one.error for one in failed).most_common()
    ]


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()


def aiperf_records(measurement: Measurement) -> Iterator[dict[str, Any]]:
    """Yield the rows of `profile_export.jsonl`: the requests that ended in the window, in order of their end.

    A draft is a session, and its steps are the session's turns.
    """
    ended = [one for one in measurement.requests if measurement.window.holds(one.done_at)]
    for one in sorted(ended, key=lambda request: request.done_at):
        if one.ended == "error" and one.error in BUSY:
            continue
        yield {
            "metadata": {
                "session_num": one.draft,
                "turn_index": one.step,
                "request_start_ns": _nanoseconds(measurement, one.sent_at),
                "request_end_ns": _nanoseconds(measurement, one.done_at),
                "worker_id": one.server,
                "record_processor_id": "streamsyn",
                "benchmark_phase": "profiling",
                "was_cancelled": one.ended == "aborted",
            },
            "metrics": {
                name: {"value": value, "unit": unit} for name, (value, unit) in record_metrics(one).items()
            }
            if one.ended == "ok"
            else {},
            "error": {"type": one.error, "message": one.error_message} if one.ended == "error" else None,
        }


def _nanoseconds(measurement: Measurement, at: float) -> int:
    return round((measurement.started_at + at) * 1e9)
