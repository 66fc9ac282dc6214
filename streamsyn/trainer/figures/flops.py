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

from streamsyn.trainer.stream.examples import StepPlan

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}
"""Dense bf16 FLOPs a second, by words in the name of the device: the maker's data sheets."""


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
    return next((peak for name, peak in PEAKS.items() if words >= set(name.split())), None)


def work_of(model: Any) -> Work | None:
    """What a model of transformers costs; None for a mixture of experts, which uses a part of its weights."""
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in _EXPERTS):
        return None
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    body = sum(_cost(one) for one in model.parameters() if one is not embedding and one is not head)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Work(body, _cost(head), 12 * config.num_hidden_layers * width)


def _cost(weight: Any) -> float:
    """FLOPs of a weight for each token; under ZeRO-3 a weight itself is empty."""
    return float(getattr(weight, "ds_numel", weight.numel()) * (6 if weight.requires_grad else 4))
