"""Cost models: the time of prefill and decode with continuous batching, and the resulting capacity."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from streamsyn.errors import ConfigError

PLAIN: Final = "plain"
"""Name of the model without batching: each request on its own clock (`latency_ms`, `ms_per_token`)."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Times in seconds, sizes in tokens. All costs are linear except the attention of a prefill."""

    name: str
    prefill_s: float
    """Per prefill batch of any size."""
    prompt_token_s: float
    """Per computed prompt token."""
    cached_token_s: float
    """Per cached token before the computed ones of a prefill: the cost of reading it."""
    attention_s: float
    """Per pair of a computed prompt token and a token before it."""
    padded_attention_s: float
    """Per pair of tokens in a prefill's context: for attention that computes all, cached or not."""
    step_s: float
    """Per decode step of any batch size: the weights are read once."""
    request_step_s: float
    """Per running request and decode step."""
    kv_token_step_s: float
    """Per token in the running requests' contexts and decode step."""
    pool_tokens: int
    """KV pool (`max_total_num_tokens`), shared by running requests and the prefix cache."""
    max_running_requests: int
    max_prefill_tokens: int
    """Maximum computed tokens in a prefill batch."""
    chunked_prefill_size: int
    """Prompts are split so that a prefill batch computes at most this many tokens."""
    source: str = ""
    """Where the figures come from, in a line."""

    def __post_init__(self) -> None:
        for name in ("pool_tokens", "max_running_requests", "max_prefill_tokens", "chunked_prefill_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.step_s > 0:
            raise ConfigError(f"step_s must be positive, not {self.step_s}")

    @property
    def prefill_tokens(self) -> int:
        """Maximum tokens that a prefill batch computes."""
        return min(self.max_prefill_tokens, self.chunked_prefill_size)

    def prefill(self, parts: Iterable[tuple[int, int]]) -> float:
        """Return the seconds of a prefill batch; each part is (tokens before, new tokens)."""
        seconds = self.prefill_s
        for before, new in parts:
            pairs = new * before + new * new / 2
            seconds += new * self.prompt_token_s + before * self.cached_token_s + pairs * self.attention_s
            seconds += (before + new) ** 2 * self.padded_attention_s
        return seconds

    def decode(self, batch: int, context: int, steps: int) -> float:
        """Return the seconds of `steps` decode steps of `batch` requests with `context` tokens at the start.

        Exact, growth included: step j reads context + batch * j tokens.
        """
        flat = self.step_s + self.request_step_s * batch + self.kv_token_step_s * context
        return steps * flat + self.kv_token_step_s * batch * (steps * (steps + 1) / 2)

    def steps_until(self, batch: int, context: int, seconds: float) -> int:
        """Return the least number of decode steps that take at least `seconds`: the inverse of `decode`."""
        if seconds <= 0:
            return 0
        growth = self.kv_token_step_s * batch / 2
        flat = self.step_s + self.request_step_s * batch + self.kv_token_step_s * context + growth
        # growth * n * n + flat * n = seconds, in the form without cancellation for small growth
        root = 2 * seconds / (flat + math.sqrt(flat * flat + 4 * growth * seconds))
        steps = max(0, math.ceil(root))
        while steps > 0 and self.decode(batch, context, steps - 1) >= seconds:
            steps -= 1
        while self.decode(batch, context, steps) < seconds:
            steps += 1
        return steps


def largest_batch(model: CostModel, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> int:
    """Return how many requests of one kind run at once in the steady state.

    The limit is `max_running_requests`, or the pool: it holds the cached prefix once, and for each request
    its own part of the prompt and, on average, half of its answer.
    """
    held = prompt_tokens - cached_tokens + completion_tokens / 2
    room = int((model.pool_tokens - cached_tokens) / max(1.0, held))
    return max(1, min(model.max_running_requests, room))


def capacity(model: CostModel, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> float:
    """Return the requests per second of a server that always has requests of one kind.

    `cached_tokens` of each prompt come from the prefix cache. Derivation: let B requests run at once (see
    `largest_batch`). While one of them generates its m tokens, m - 1 decode steps pass, since prefill gives
    the first token. In that time each of the B ends once, and B others are prefilled in their places. Prefill
    and decode alternate, so such a round takes

        (m - 1) * step(B, mean context) + B * prefill of one + overhead * prefill batches

    where the mean context of a request is its prompt and half of its answer. B / (m - 1) requests end per
    step. A prefill batch follows each step at which any request ends: a share of 1 - exp(-B / (m - 1)) of all
    steps, if the ends are independent. There are more batches if the tokens do not fit into one. Two things
    are not counted: the scheduler reserves room for new tokens, so the pool is 90 to 97 per cent full, and
    retracted requests are computed again. Both cost nothing where `max_running_requests` limits the batch,
    and up to 8 per cent where the pool does.
    """
    batch = largest_batch(model, prompt_tokens, cached_tokens, completion_tokens)
    new = prompt_tokens - cached_tokens
    one = model.prefill([(cached_tokens, new)]) - model.prefill_s
    steps = max(0, completion_tokens - 1)
    prefills = batch * new / model.prefill_tokens
    if steps:
        prefills = max(prefills, steps * -math.expm1(-batch / steps))
    decode_s = model.decode(batch, batch * prompt_tokens, steps)
    return batch / (decode_s + batch * one + prefills * model.prefill_s)


CPU: Final = CostModel(
    name="cpu",
    prefill_s=0.086,
    prompt_token_s=1.60e-3,
    cached_token_s=2.9e-4,
    attention_s=0.0,
    padded_attention_s=4.3e-7,
    step_s=0.058,
    request_step_s=0.0035,
    kv_token_step_s=4.3e-5,
    pool_tokens=32_768,
    max_running_requests=32,
    max_prefill_tokens=16_384,
    chunked_prefill_size=8_192,
    source="two CPU cores, SmolLM2-135M, SGLang 0.5.23, measured by benchmarks/calibrate.py",
)
"""Two CPU cores with SmolLM2-135M under SGLang 0.5.23 (`deploy/sglang-cpu`), by `benchmarks/calibrate.py`.

Medians of three rounds, fitted by least squares: 12 prefills of 128 to 2,304 tokens, off by at most 7 per
cent, and 10 decode steps of 1 to 32 requests that hold 88 to 17,152 tokens, off by at most 6. SGLang's
torch_native attention pads the computed tokens to the whole prompt, so a prompt of 1,024 tokens, all cached
except one, takes 0.86 s; without a cache it takes 2.2 s.
"""

H100: Final = CostModel(
    name="h100",
    prefill_s=0.008,
    prompt_token_s=29.5e-6,
    cached_token_s=0.0,
    attention_s=1.06e-9,
    padded_attention_s=0.0,
    step_s=0.0068,
    request_step_s=18e-6,
    kv_token_step_s=46e-9,
    pool_tokens=444_500,
    max_running_requests=2_048,
    max_prefill_tokens=16_384,
    chunked_prefill_size=8_192,
    source="one H100 80GB, Llama-3.1-8B in bf16, SGLang: roofline, compared with published measurements in "
    "streamsyn/simulator/costs.py",
)
"""One H100 80GB with Llama-3.1-8B in bf16 under SGLang: roofline, compared with published measurements.

Weights of 16.06 GB at 3.35 TB/s make 4.8 ms a step, measured are 6.9 ms. A token's keys and values are
32 layers * 8 heads * 128 * 2 * 2 bytes = 128 KiB, read at 85 % of that bandwidth. A token costs 16.06 GFLOP:
prefill at 55 % of 989 TFLOPS; in a decode step such work hides behind the weights in small batches and not in
large ones, for which 18 us a request is the straight line. Attention is 4 * 4096 * 32 FLOP a pair at half the
peak. Limits are those that the server printed at its start.

Published, and what this model gives for the same (`tests/simulator/test_costs.py`):
- start-up log of the SGLang documentation (https://docs.sglang.ai/start/send_request.html, January 2025):
  444,500 tokens of KV pool, max_prefill_tokens 16,384, chunks of 8,192, 2,049 requests at most; one request
  decodes at 144.0 tokens/s. Model: 146.6.
- https://github.com/sgl-project/sglang/pull/1060 (bench_serving, 1,000 prompts of 4,065 tokens on average, 4
  new tokens each): 27,670 prompt tokens/s. Model: 30,500.
- https://research.aimultiple.com/inference-engines (offline, 1,000 ShareGPT prompts at once, unknown
  lengths): 16,215 new tokens/s. Model, with 220 tokens in and 200 out: 13,900.
Not used: https://github.com/sgl-project/sglang/issues/1639. All of its 453,502 prompt tokens were computed in
8.6 s; that would be 85 % of the peak of one H100, so it was more than one, or not bf16.
"""

PRESETS: Final = {model.name: model for model in (CPU, H100)}
NAMES: Final = (PLAIN, *PRESETS)
