"""What a training step has to compute: relative to its devices' peak, model FLOPs utilisation (MFU), and
how evenly it is divided among the ranks.

FLOPs are those that the model needs, forward and backward, without what is recomputed to save memory:

    a trained weight    6 per token that it is applied to: 2 forward, 4 backward
    a frozen weight     4 per token: it has no gradient of its own
    attention           12 * layers * heads * head_dim * sum of squared lengths of the samples

The head is applied at targets only; the input embedding is a lookup and costs nothing. Attention is counted
as non-causal over each sample's own tokens, as in many published figures: twice what causal kernels compute.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from streamsyn.trainer.examples import StepPlan

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

# From the vendors' data sheets; half the figure where there is only one for sparse weights (since Hopper).
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
    "A10G": 70e12,  # from the data sheet on AWS
    # GeForce: the appendix of each architecture's white paper, "BF16 with FP32 accumulate".
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307.4e12,
}
"""Dense bf16 FLOPs per second, by words in the name of the device."""
_DIFFERENT = re.compile(r"MIG|\d+[ABCQ]|Laptop|Max|Ti|D")
"""Words that make it a different device: a slice (`A10-4Q` is a virtual GPU) or a variant."""


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """What a model costs: FLOPs per token, per target, and per squared length of a sample."""

    token: float
    target: float
    squared: float

    def flops(self, sizes: Iterable[tuple[int, int]]) -> float:
        """FLOPs of a step over samples, each given as (tokens, targets)."""
        return sum(
            self.token * tokens + self.target * targets + self.squared * tokens**2
            for tokens, targets in sizes
        )


@dataclass(frozen=True, slots=True)
class Mfu:
    """Computes the utilisation of devices that reach `peak` FLOPs per second together."""

    model: ModelFlops
    peak: float

    def utilisation(self, plan: StepPlan, seconds: float) -> float:
        """The share of the peak that a step over `plan` reached."""
        sizes = ((one.length, one.target_tokens) for one in plan.examples())
        return self.model.flops(sizes) / (self.peak * max(seconds, 1e-9))


@dataclass(frozen=True, slots=True)
class Balance:
    """Computes how long ranks wait for the slowest one, on devices that are equally fast."""

    model: ModelFlops
    ranks: int

    def idle(self, plan: StepPlan) -> tuple[float, int]:
        """The share of a step in which a rank waits for the slowest one, in the mean over ranks, and the
        number of that rank.
        """
        costs = [
            self.model.flops(
                (one.length, one.target_tokens) for row in plan.rows[rank :: self.ranks] for one in row
            )
            for rank in range(self.ranks)
        ]
        most = max(costs)
        return 1 - sum(costs) / (self.ranks * most), costs.index(most)


def balance_of(model: Any, ranks: int) -> Balance | None:
    """The balance of a model's steps; None for one rank, or if the model is unknown."""
    flops = model_flops(model) if ranks > 1 else None
    return None if flops is None else Balance(flops, ranks)


def mfu_of(model: Any, device: torch.device, ranks: int) -> Mfu | None:
    """The utilisation of a model on one device per rank; None if the device or the model is unknown."""
    if device.type != "cuda":
        return None
    peak, flops = peak_flops(torch.cuda.get_device_name(device)), model_flops(model)
    return None if peak is None or flops is None else Mfu(flops, peak * ranks)


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOPs per second of a device, by its name; None if it is unknown."""
    words = set(re.split(r"[\s-]+", device))
    if any(map(_DIFFERENT.fullmatch, words)):
        return None
    return next((peak for name, peak in PEAKS.items() if words >= set(name.split())), None)


def model_flops(model: Any) -> ModelFlops | None:
    """What a model of transformers costs; None for a mixture of experts, which uses few of its weights,
    and for a model without attention.
    """
    config = model.config.get_text_config()
    layers = [config] * config.num_hidden_layers
    if getattr(config, "is_heterogeneous", False):  # its own attributes raise where layers differ
        layers = [config.per_layer_config[number] for number in range(config.num_hidden_layers)]
    if any(getattr(one, name, None) for one in layers for name in _EXPERTS):
        return None
    if not all(hasattr(one, "num_attention_heads") for one in layers):
        return None
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    body = sum(_cost(one) for one in model.parameters() if one is not embedding and one is not head)
    width = sum(
        one.num_attention_heads
        * (getattr(one, "head_dim", None) or one.hidden_size // one.num_attention_heads)
        for one in layers
    )
    return ModelFlops(body, _cost(head), 12 * width)


def _cost(weight: Any) -> float:
    """FLOPs per token: 2 per weight forward, 2 for the gradient passed on, 2 for its own."""
    return float(weight.numel() * (6 if weight.requires_grad else 4))
