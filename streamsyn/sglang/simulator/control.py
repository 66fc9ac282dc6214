import time
from datetime import UTC, datetime
from typing import Any

from streamsyn.sglang.simulator import wire
from streamsyn.sglang.simulator.asks import Malformed
from streamsyn.sglang.simulator.chat import render
from streamsyn.sglang.simulator.config import SGLANG_VERSION
from streamsyn.sglang.simulator.line import Asked
from streamsyn.sglang.simulator.loads import SECTIONS, load, metrics, server_info
from streamsyn.sglang.simulator.reading import Spelling
from streamsyn.sglang.simulator.simulation import Simulation

FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)


class Control:
    """The routes that tell or steer: load, model, cache, aborts, and the simulator's own."""

    def __init__(self, simulation: Simulation, spelling: Spelling) -> None:
        self._simulation = simulation
        self._spelling = spelling

    def loads(self, asked: Asked) -> wire.Reply:
        """GET /v1/loads."""
        include = asked.query.get("include")
        sections = {name.strip() for name in include.split(",")} if include else {"all"}
        if unknown := sections - SECTIONS:
            message = f"Invalid include sections: {unknown}. Valid options: {sorted(SECTIONS)}"
            return wire.reply(wire.error(message, "400", 400), 400)
        body = {
            "timestamp": datetime.now(UTC).isoformat(),
            "version": SGLANG_VERSION,
            "accelerator": None,
            "num_accelerators": 1,
            "loads": [load(self._simulation, sections)],
        }
        return wire.reply(body)

    def server_info(self, _asked: Asked) -> wire.Reply:
        """GET /server_info and /get_server_info."""
        return wire.reply(server_info(self._simulation))

    def model_info(self, _asked: Asked) -> wire.Reply:
        """GET /model_info and /get_model_info."""
        weights = self._simulation.weights
        body = {
            "model_path": weights.path,
            "served_model_name": weights.path,
            "tokenizer_path": self._simulation.config.model,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": weights.told,
            "load_format": "auto",
            "reasoning_parser": None,
            "tool_call_parser": None,
            "disaggregation_mode": "null",
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
        }
        return wire.reply(body)

    def models(self, _asked: Asked) -> wire.Reply:
        """GET /v1/models: the name it was started with is gone once it has read other weights."""
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
        return wire.reply({"object": "list", "data": [card]})

    def metrics(self, _asked: Asked) -> wire.Reply:
        """GET /metrics."""
        text = metrics(self._simulation)
        return wire.Reply(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    def abort(self, asked: Asked) -> wire.Reply:
        """POST /abort_request: 200 with an empty body, whether or not anything was aborted."""
        try:
            body = wire.read_object(asked.body)
        except Malformed as error:
            return wire.malformed(str(error))
        rid, engine = body.get("rid"), self._simulation.engine
        if body.get("abort_all") is True:
            engine.abort_all()
        elif isinstance(rid, str):
            engine.abort(rid, exact=self._simulation.config.tokenizer_workers == 1)
        return wire.Reply()

    def flush(self, _asked: Asked) -> wire.Reply:
        """GET and POST /flush_cache."""
        engine = self._simulation.engine
        if engine.running or engine.waiting:
            return wire.Reply(400, b"Flush cache failed.\n")
        engine.cache.clear()
        return wire.Reply(200, FLUSHED.encode())

    def tokenize(self, asked: Asked) -> wire.Reply:
        """POST /tokenize and /v1/tokenize."""
        try:
            tokens = _tokenize(wire.read_object(asked.body), self._spelling)
        except Malformed as error:
            return wire.malformed(str(error))
        count = [len(ids) for ids in tokens] if tokens and isinstance(tokens[0], list) else len(tokens)
        return wire.reply(
            {"tokens": tokens, "count": count, "max_model_len": self._simulation.config.context_tokens}
        )

    def stats(self, _asked: Asked) -> wire.Reply:
        """GET /simulator/stats."""
        return wire.reply(self._simulation.stats.as_dict())

    def reset(self, _asked: Asked) -> wire.Reply:
        """POST /simulator/reset."""
        self._simulation.reset()
        return wire.reply(self._simulation.stats.as_dict())


def _tokenize(body: dict[str, Any], spelling: Spelling) -> list[Any]:
    prompt, messages = body.get("prompt"), body.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        return spelling.learn(render(messages, goes_on=bool(body.get("continue_final_message"))))
    if isinstance(prompt, str):
        return spelling.learn(prompt)
    if isinstance(prompt, list) and all(isinstance(text, str) for text in prompt):
        return [spelling.learn(text) for text in prompt]
    raise Malformed("prompt: Input should be a valid string or list of strings")
