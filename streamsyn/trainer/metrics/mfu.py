"""What a training step computes, against what its devices could: the model FLOPs utilisation.

Counted is what the model needs, forward and backward, whatever is computed again to save memory:

    a weight that is trained    6 for each token it is applied to: 2 forward, 4 backward
    a weight that is not        4 for each token: its own gradient is left out
    attention                   12 * layers * heads * head_dim * sum of squared lengths of the samples

The head is applied at targets alone, the input embedding is looked up and costs nothing. Attention is counted
whole (non-causal), over each sample's own tokens; many figures that are published count it so. It is twice
what causal kernels compute.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from streamsyn.trainer.examples import StepPlan

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

# The makers' data sheets; where one gives a figure for sparse weights alone (all since Hopper), half of it.
PEAKS = {
    "GB300": 2500e12,  # GB300 NVL72: 360 PFLOPS sparse for 72
    "B300": 2250e12,  # HGX B300: 36 PFLOPS sparse for 8
    "GB200": 2500e12,  # GB200 NVL72: 360 PFLOPS sparse for 72
    "B200": 2250e12,  # HGX B200: 36 PFLOPS sparse for 8
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "A10G": 70e12,  # the data sheet that AWS has of it
    # GeForce: the appendix of each architecture's white paper, "BF16 with FP32 accumulate".
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307.4e12,
}
"""Dense bf16 FLOPs a second, by words in the name of the device."""
_OTHERS = re.compile(r"MIG|\d+[ABCQ]|Laptop|Max|Ti|D")
"""Words that make a device another one: a slice of it (`A10-4Q` is a virtual one), or one that is only named
after it."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a model costs: FLOPs for each token, for each target, and for each squared length of a sample."""

    token: float
    target: float
    squared: float

    def flops(self, sizes: Iterable[tuple[int, int]]) -> float:
        """Of a step over samples of (tokens, targets)."""
        return sum(
            self.token * tokens + self.target * targets + self.squared * tokens**2
            for tokens, targets in sizes
        )


@dataclass(frozen=True, slots=True)
class Speed:
    """What a model costs, on devices that can do `peak` FLOPs a second together."""

    work: Work
    peak: float

    def utilisation(self, plan: StepPlan, seconds: float) -> float:
        """The share of the peak that a step over `plan` came to."""
        sizes = ((one.length, one.target_tokens) for one in plan.examples())
        return self.work.flops(sizes) / (self.peak * max(seconds, 1e-9))


def speed_of(model: Any, device: torch.device, ranks: int) -> Speed | None:
    """What a model costs on as many devices as there are ranks; None where one of the two is not known."""
    if device.type != "cuda":
        return None
    peak, work = peak_flops(torch.cuda.get_device_name(device)), work_of(model)
    return None if peak is None or work is None else Speed(work, peak * ranks)


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOPs a second of a device by its name; None when it is not known."""
    words = set(re.split(r"[\s-]+", device))
    if any(map(_OTHERS.fullmatch, words)):
        return None
    return next((peak for name, peak in PEAKS.items() if words >= set(name.split())), None)


def work_of(model: Any) -> Work | None:
    """What a model of transformers costs; None for a mixture of experts, which uses a part of its weights."""
    config = model.config.get_text_config()
    layers = [config] * config.num_hidden_layers
    if getattr(config, "is_heterogeneous", False):  # asked for what its layers have otherwise, it raises
        layers = [config.per_layer_config[number] for number in range(config.num_hidden_layers)]
    if any(getattr(one, name, None) for one in layers for name in _EXPERTS):
        return None
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    body = sum(_cost(one) for one in model.parameters() if one is not embedding and one is not head)
    width = sum(
        one.num_attention_heads
        * (getattr(one, "head_dim", None) or one.hidden_size // one.num_attention_heads)
        for one in layers
    )
    return Work(body, _cost(head), 12 * width)


def _cost(weight: Any) -> float:
    """FLOPs per token: 2 per weight forward, 2 for the gradient passed on, 2 for its own."""
    return float(weight.numel() * (6 if weight.requires_grad else 4))
