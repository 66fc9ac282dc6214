"""All routes of the server, over any transport: generation, weight updates, state and aborts.

Shapes: srt/managers/load_snapshot.py, srt/utils/common.py, srt/observability/metrics_collector.py.
"""

import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

from streamsyn.simulator import protocol
from streamsyn.simulator.chat import Chat, render
from streamsyn.simulator.completion_request import Malformed
from streamsyn.simulator.engine import Load
from streamsyn.simulator.generation import Generation
from streamsyn.simulator.native import Native
from streamsyn.simulator.protocol import RawRequest, ResponseWriter
from streamsyn.simulator.settings import SGLANG_VERSION
from streamsyn.simulator.simulation import Simulation
from streamsyn.simulator.texts import Tokenizer
from streamsyn.simulator.weights import WeightRoutes

SECTIONS: Final = frozenset({"core", "memory", "spec", "lora", "disagg", "queues", "all"})
FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)
OPEN_TO_ALL: Final = ("/health", "/ready", "/metrics")
"""Paths with these prefixes need no key (srt/utils/auth.py)."""

Handler: TypeAlias = Callable[[RawRequest], protocol.Reply | Awaitable[protocol.Reply]]
Route: TypeAlias = Generation | Handler


class Routes:
    """Checks the API key, counts requests, and calls the route for the path and method."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        key = simulation.config.api_key
        self._key = key.encode() if key is not None else None
        chat = Generation(simulation, Chat(cache_report=simulation.config.cache_report), json_only=True)
        tokenizer = Tokenizer()
        generate = Generation(simulation, Native(tokenizer, simulation.weights), json_only=False)
        self._routes: dict[str, dict[str, Route]] = {
            "/v1/chat/completions": {"POST": chat},
            "/generate": {"POST": generate, "PUT": generate},
            **_state_routes(StateRoutes(simulation, tokenizer)),
            **_weight_routes(WeightRoutes(simulation.weights, simulation.engine, simulation.config.load_s)),
        }

    async def serve(self, raw: RawRequest, writer: ResponseWriter) -> None:
        """Answer one request."""
        methods = self._routes.get(raw.path)
        route = methods.get(raw.method) if methods else None
        self._simulation.stats.by_route[raw.path if route else "unknown"] += 1
        if not self._is_authorized(raw):
            await writer.send(protocol.reply({"error": "Unauthorized"}, 401))
        elif isinstance(route, Generation):
            await route.serve(raw, writer)
        elif route:
            result = route(raw)
            await writer.send(result if isinstance(result, protocol.Reply) else await result)
        elif methods:
            await writer.send(protocol.reply({"detail": "Method Not Allowed"}, 405))
        else:
            await writer.send(protocol.reply({"detail": "Not Found"}, 404))

    def _is_authorized(self, raw: RawRequest) -> bool:
        if self._key is None or raw.path.startswith(OPEN_TO_ALL):
            return True
        scheme, _, token = raw.authorization.partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(token.encode(), self._key)


def _state_routes(state: "StateRoutes") -> dict[str, dict[str, Route]]:
    return {
        "/v1/loads": _get(state.loads),
        "/v1/models": _get(state.models),
        "/server_info": _get(state.server_info),
        "/get_server_info": _get(state.server_info),
        "/model_info": _get(state.model_info),
        "/get_model_info": _get(state.model_info),
        "/tokenize": {"POST": state.tokenize},
        "/v1/tokenize": {"POST": state.tokenize},
        "/abort_request": {"POST": state.abort},
        "/flush_cache": _get(state.flush) | {"POST": state.flush},
        "/metrics": _get(state.metrics),
        "/simulator/stats": _get(state.stats),
        "/simulator/reset": {"POST": state.reset},
    }


def _weight_routes(weights: WeightRoutes) -> dict[str, dict[str, Route]]:
    return {
        "/health": _get(weights.health),
        "/health_generate": _get(weights.health),
        "/ready": _get(weights.ready),
        "/pause_generation": {"POST": weights.pause},
        "/continue_generation": {"POST": weights.resume},
        "/update_weights_from_disk": {"POST": weights.update},
    }


def _get(route: Handler) -> dict[str, Route]:
    return {"GET": route, "HEAD": route}


class StateRoutes:
    """The routes for load, models, cache, tokenizer and aborts, and the simulator's own."""

    def __init__(self, simulation: Simulation, tokenizer: Tokenizer) -> None:
        self._simulation = simulation
        self._tokenizer = tokenizer

    def loads(self, raw: RawRequest) -> protocol.Reply:
        """GET /v1/loads."""
        include = raw.query.get("include")
        sections = {name.strip() for name in include.split(",")} if include else {"all"}
        if unknown := sections - SECTIONS:
            message = f"Invalid include sections: {unknown}. Valid options: {sorted(SECTIONS)}"
            return protocol.reply(protocol.error(message, "400", 400), 400)
        body = {
            "timestamp": datetime.now(UTC).isoformat(),
            "version": SGLANG_VERSION,
            "accelerator": None,
            "num_accelerators": 1,
            "loads": [load(self._simulation, sections, rank) for rank in range(len(self._simulation.ranks))],
        }
        return protocol.reply(body)

    def server_info(self, _raw: RawRequest) -> protocol.Reply:
        """GET /server_info and /get_server_info."""
        return protocol.reply(server_info(self._simulation))

    def model_info(self, _raw: RawRequest) -> protocol.Reply:
        """GET /model_info and /get_model_info."""
        weights = self._simulation.weights
        body = {
            "model_path": weights.path,
            "served_model_name": weights.path,
            "tokenizer_path": self._simulation.config.model,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": weights.reported_version,
            "load_format": "auto",
            "reasoning_parser": None,
            "tool_call_parser": None,
            "disaggregation_mode": "null",
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
        }
        return protocol.reply(body)

    def models(self, _raw: RawRequest) -> protocol.Reply:
        """GET /v1/models: after a weight update the model has the name of the directory."""
        config, name = self._simulation.config, self._simulation.weights.path
        card = {
            "id": name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "sglang",
            "root": name,
            "parent": None,
            "max_model_len": config.context_tokens,
        }
        return protocol.reply({"object": "list", "data": [card]})

    def metrics(self, _raw: RawRequest) -> protocol.Reply:
        """GET /metrics."""
        text = metrics(self._simulation)
        return protocol.Reply(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    def abort(self, raw: RawRequest) -> protocol.Reply:
        """POST /abort_request: 200 with an empty body, whether or not anything was aborted."""
        try:
            body = protocol.read_object(raw.body)
        except Malformed as error:
            return protocol.malformed(str(error))
        rid, engine = body.get("rid"), self._simulation.engine
        if body.get("abort_all") is True:
            engine.abort_all()
        elif isinstance(rid, str):
            engine.abort(rid, exact=self._simulation.config.tokenizer_workers == 1)
        return protocol.Reply()

    def flush(self, _raw: RawRequest) -> protocol.Reply:
        """GET and POST /flush_cache."""
        engine = self._simulation.engine
        if engine.running or engine.waiting:
            return protocol.Reply(400, b"Flush cache failed.\n")
        engine.cache.clear()
        return protocol.Reply(200, FLUSHED.encode())

    def tokenize(self, raw: RawRequest) -> protocol.Reply:
        """POST /tokenize and /v1/tokenize."""
        try:
            tokens = _tokenize(protocol.read_object(raw.body), self._tokenizer)
        except Malformed as error:
            return protocol.malformed(str(error))
        count = [len(ids) for ids in tokens] if tokens and isinstance(tokens[0], list) else len(tokens)
        return protocol.reply(
            {"tokens": tokens, "count": count, "max_model_len": self._simulation.config.context_tokens}
        )

    def stats(self, _raw: RawRequest) -> protocol.Reply:
        """GET /simulator/stats."""
        return protocol.reply(self._simulation.stats.as_dict())

    def reset(self, _raw: RawRequest) -> protocol.Reply:
        """POST /simulator/reset."""
        self._simulation.reset()
        return protocol.reply(self._simulation.stats.as_dict())


def _tokenize(body: dict[str, Any], tokenizer: Tokenizer) -> list[Any]:
    prompt, messages = body.get("prompt"), body.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        return tokenizer.encode(render(messages, continues=bool(body.get("continue_final_message"))))
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if isinstance(prompt, list) and all(isinstance(text, str) for text in prompt):
        return [tokenizer.encode(text) for text in prompt]
    raise Malformed("prompt: Input should be a valid string or list of strings")


def load(simulation: Simulation, sections: set[str], rank: int = 0) -> dict[str, Any]:
    """Return the entry of a data-parallel rank in `/v1/loads`."""
    result, stats = simulation.ranks[rank].load(), simulation.stats
    generated = simulation.engine.load().generated_tokens
    uncached = result.waiting_uncached_tokens
    if uncached is None:
        uncached = int(result.waiting_tokens * (1 - stats.cache_hit_rate))
    hit_rate = stats.cache_hit_rate if result.cache_hit_rate is None else result.cache_hit_rate
    prefilled = result.prefilled_tokens
    entry: dict[str, Any] = {
        "timestamp": time.time(),
        "dp_rank": rank,
        "num_running_reqs": result.running,
        "num_waiting_reqs": result.waiting,
        "num_waiting_uncached_tokens": uncached,
        "num_used_tokens": result.used_tokens,
        "num_total_tokens": result.used_tokens + result.waiting_tokens,
        "num_active_tokens": result.used_tokens + result.waiting_tokens,
        "num_prealloc_ready_tokens": 0,
        "max_total_num_tokens": result.pool_tokens,
        "max_running_requests": result.max_running_requests,
        "token_usage": round(min(1.0, result.used_tokens / result.pool_tokens), 4),
        "gen_throughput": round(simulation.tokens_per_s(generated) / len(simulation.ranks), 2),
        "cache_hit_rate": round(hit_rate, 4),
        "utilization": round(result.running / result.max_running_requests, 4),
        "total_prefill_uncached_tokens": stats.prompt_tokens - stats.cached_tokens
        if prefilled is None
        else prefilled,
        "total_prefill_busy_us": 0,
        "decode_moments": None,
    }
    return entry | dict(_details(result, sections))


def server_info(simulation: Simulation) -> dict[str, Any]:
    """Return `/server_info`: simulated flags and the scheduler's limits."""
    config, result = simulation.config, simulation.ranks[0].load()
    generated = simulation.engine.load().generated_tokens
    return {
        "model_path": config.model,
        "served_model_name": config.model,
        "tokenizer_path": config.model,
        "context_length": config.context_tokens,
        "max_running_requests": result.max_running_requests,
        "max_queued_requests": config.queue_limit,
        "max_total_tokens": result.pool_tokens,
        "schedule_policy": config.schedule_policy,
        "disable_radix_cache": config.cache_tokens == 0,
        "enable_cache_report": config.cache_report,
        "enable_hierarchical_cache": False,
        "enable_metrics": True,
        "tokenizer_worker_num": config.tokenizer_workers,
        "dp_size": config.dp_size,
        "attn_dp_size": 1,
        "tp_size": 1,
        "random_seed": config.seed,
        "launch_command": "streamsyn simulate",
        "status": "ready",
        "max_total_num_tokens": result.pool_tokens,
        "max_req_input_len": config.context_tokens - 1,
        "kv_events": None,
        "startup_time": simulation.started_at,
        "internal_states": [
            {
                "last_gen_throughput": simulation.tokens_per_s(generated) / len(simulation.ranks),
                "effective_max_running_requests_per_dp": result.max_running_requests,
            }
            for _ in simulation.ranks
        ],
        "version": SGLANG_VERSION,
        "frontend": "python",
    }


def _details(result: Load, sections: set[str]) -> Iterator[tuple[str, Any]]:
    if sections & {"all", "memory"}:
        yield (
            "memory",
            {
                "weight_gb": 0.0,
                "kv_cache_gb": 0.0,
                "graph_gb": 0.0,
                "token_capacity": result.pool_tokens,
            },
        )
    if sections & {"all", "disagg"}:
        yield (
            "disaggregation",
            {
                "mode": "null",
                "prefill_bootstrap_queue_reqs": 0,
                "prefill_inflight_queue_reqs": 0,
                "decode_prealloc_queue_reqs": 0,
                "decode_transfer_queue_reqs": 0,
                "decode_retracted_queue_reqs": 0,
                "kv_transfer_speed_gb_s": 0.0,
                "kv_transfer_latency_ms": 0.0,
            },
        )
    if sections & {"all", "queues"}:
        yield (
            "queues",
            {
                "waiting": result.waiting,
                "grammar": 0,
                "paused": 0,
                "retracted": result.retracted,
                "prealloc_ready": 0,
            },
        )


_GAUGES: Final = (
    "num_running_reqs",
    "num_queue_reqs",
    "num_used_tokens",
    "token_usage",
    "gen_throughput",
    "cache_hit_rate",
    "utilization",
    "max_total_num_tokens",
)


def metrics(simulation: Simulation) -> str:
    """Return Prometheus text with the main metrics of the real server's `--enable-metrics`."""
    stats, result = simulation.stats, simulation.engine.load()
    labels = f'model_name="{simulation.config.model}",engine_type="unified"'
    loads = [load(simulation, {"core"}, rank) for rank in range(len(simulation.ranks))]
    counters = {
        ("prompt_tokens_total", 'is_streaming="False"'): stats.prompt_tokens,
        ("generation_tokens_total", 'is_streaming="False"'): stats.completion_tokens,
        ("cached_tokens_total", 'cache_source="device"'): stats.cached_tokens,
        ("num_requests_total", 'is_streaming="False"'): stats.answered,
        ("num_aborted_requests_total", ""): stats.aborted,
        ("num_retracted_requests_total", ""): result.retracted_in_all,
    }
    lines = []
    for name in _GAUGES:
        lines.append(f"# TYPE sglang:{name} gauge")
        for rank, core in enumerate(loads):
            marked = f'{labels},tp_rank="0",pp_rank="0",moe_ep_rank="0"'
            marked += f',dp_rank="{rank}"' if len(loads) > 1 else ""
            value = core["num_waiting_reqs" if name == "num_queue_reqs" else name]
            lines.append(f"sglang:{name}{{{marked}}} {float(value)}")
    for (name, label), count in counters.items():
        marked = f"{labels},{label}" if label else labels
        lines += [f"# TYPE sglang:{name} counter", f"sglang:{name}{{{marked}}} {float(count)}"]
    latency = "sglang:e2e_request_latency_seconds"
    lines += [
        f"# TYPE {latency} histogram",
        f"{latency}_sum{{{labels}}} {stats.answered_s}",
        f'{latency}_bucket{{le="+Inf",{labels}}} {float(stats.answered)}',
        f"{latency}_count{{{labels}}} {float(stats.answered)}",
    ]
    return "\n".join(lines) + "\n"
