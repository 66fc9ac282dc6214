"""How much memory a training needs on each GPU, worked out without a GPU and without weights.

The model is made of meta tensors, which have shapes but no data. A forward and backward pass over the row of
the dry step then allocates what a real one would, and the largest sum that is alive at a time is the memory
of the activations. The rest follows from the number of weights and of GPUs, over which FSDP2 shards them.
"""

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import orjson
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from streamsyn.config.command_sections import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.plain_text import visible
from streamsyn.trainer.dry_step import largest_row
from streamsyn.trainer.gathering import Gathering
from streamsyn.trainer.model.activations import is_recomputed, recompute
from streamsyn.trainer.model.attention import VARLEN, implementation
from streamsyn.trainer.model.head import LossHead, target_losses
from streamsyn.trainer.model.loss import make_batch
from streamsyn.trainer.model.optimizer import moment_bytes
from streamsyn.trainer.model.pretrained import refused, with_adapters
from streamsyn.trainer.model.sequence_parallel import SequenceGroup

OTHER_BYTES = 2 * 10**9
"""What torch, CUDA and NCCL need for themselves, and what is lost between blocks: an estimate."""
_GB = 1e9
_PARTS = ("weights", "gradients", "moments", "gathered", "activations", "total", "host")
"""Parts of a `Need`, in the order of the table."""
_META = torch.device("meta")
_HALF, _SINGLE = 2, 4
"""Bytes of a number in bf16 and in float32."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes on each GPU with some keys of `[train]`.

    Attributes:
        keys: The keys: those that decide about memory.
        weights: This GPU's part of the weights, float32.
        gradients: Its part of the gradients, float32.
        moments: Its part of the optimizer's moments during the passes.
        gathered: Whole weights of the layers in use and gradients on their way to their GPUs, when a pass
            needs most memory.
        activations: All else that a pass has in memory then.
        total: The largest sum of all, with `OTHER_BYTES`.
        host: Host memory for what is offloaded, for each GPU.
    """

    keys: dict[str, Any]
    weights: int
    gradients: int
    moments: int
    gathered: int
    activations: int
    total: int
    host: int


def memory_plan(path: str, section: TrainSection, gpus: int) -> list[Need]:
    """What the training needs as it is configured, and then with keys that save more and more.

    With `train.sequence_parallel`, a GPU has its part of the row's tokens.

    Args:
        path: A directory with a config.json, or a name on the hub. Weights are not read.
        section: The section `train`; bf16 is assumed.
        gpus: GPUs that share weights, gradients and moments by FSDP2.

    Raises:
        ConfigError: It is not a model, it cannot be laid out without its weights, or the GPUs cannot be
            divided into groups that share rows.
    """
    if gpus % section.sequence_parallel:
        raise ConfigError(
            f"train.sequence_parallel: {gpus} GPUs cannot be divided into groups of "
            f"{section.sequence_parallel}; set --gpus to a multiple of it"
        )
    with refused(f"--model {path} is not a model that transformers reads"):
        config = AutoConfig.from_pretrained(path)
    variants: list[dict[str, Any]] = [
        {"gradient_checkpointing": False, "activation_offload": False, "optimizer_offload": False},
        {"gradient_checkpointing": "selective", "activation_offload": False, "optimizer_offload": False},
        {"gradient_checkpointing": True, "activation_offload": False, "optimizer_offload": False},
        {"gradient_checkpointing": True, "activation_offload": False, "optimizer_offload": True},
        {"gradient_checkpointing": True, "activation_offload": True, "optimizer_offload": True},
    ]
    as_configured = {name: getattr(section, name) for name in variants[0]}
    as_configured["gradient_checkpointing"] = (
        is_recomputed(section) if section.gradient_checkpointing == "auto" else section.gradient_checkpointing
    )
    others = [keys for keys in variants if keys != as_configured]
    measured: dict[Any, tuple[Any, Pass]] = {}
    found = []
    for keys in [as_configured, *others]:
        settings = section.model_copy(update=keys)
        of_pass = (keys["gradient_checkpointing"], keys["activation_offload"])
        if of_pass not in measured:  # the place of moments does not change a pass
            with refused(f"--model {path}: its memory cannot be worked out without its weights"):
                model = _on_meta(config, settings)
                degree = settings.sequence_parallel
                taken = pass_bytes(model, settings.seq_len, degree, offloads=of_pass[1], gpus=gpus)
                measured[of_pass] = (model, taken)
        found.append(_need(keys, settings, gpus, *measured[of_pass]))
    return found


@dataclass(frozen=True, slots=True)
class Pass:
    """Bytes of a forward and backward pass, besides shards of weights and gradients.

    Attributes:
        peak: The largest sum that is in memory at a time.
        gathered: How much of it FSDP2 has gathered, or has not yet added up over the GPUs.
        host: What waits in host memory.
    """

    peak: int
    gathered: int
    host: int


def pass_bytes(model: Any, tokens: int, degree: int = 1, *, offloads: bool = False, gpus: int = 1) -> Pass:
    """The bytes of a forward and backward pass over the largest row.

    Args:
        model: A model of meta tensors with our attention; its `device` may be a real one.
        tokens: Tokens of the row.
        degree: Number of ranks that share the row; the bytes are those of the first one.
        offloads: Whether what is kept for the backward pass waits in host memory.
        gpus: GPUs that share weights by FSDP2; 1 for one that has all.
    """
    host = _HostMemory()
    LossHead(model, host.offload if offloads else None)
    gathering = Gathering(model, gpus) if gpus > 1 else None
    for parameter in model.parameters():
        if parameter.requires_grad and gathering is None:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    sequence = _FirstRank(degree, 0)
    sequence.wrap_attention(model.config.get_text_config()._attn_implementation)  # noqa: SLF001 - as `place`
    shared = sequence.share(make_batch((largest_row(tokens),), [1.0], torch.device("cpu")))
    parts: dict[str, Any] = {one.name: getattr(shared, one.name) for one in fields(shared)}
    moved: dict[str, Any] = {
        name: one.to(model.device) for name, one in parts.items() if isinstance(one, torch.Tensor)
    }
    batch = replace(shared, **moved)
    given = (*model.parameters(), *model.buffers())
    with LiveMemory(given, gathering) as memory:
        (target_losses(model, batch) * batch.weights).sum().backward()
        if gathering is not None:
            gathering.finish()
    return Pass(memory.peak, memory.gathered, host.bytes)


class _FirstRank(SequenceGroup):
    """The first of the ranks that share a row, without the others: it gets back what it gives."""

    def _exchange(self, values: torch.Tensor, give: int, take: int) -> torch.Tensor:
        received = torch.stack(values.chunk(self.degree, give)).clone()
        return torch.cat(received.unbind(), take)


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they are alive.

    Args:
        given: Tensors that are not counted, nor are views of them.
        gathering: What FSDP2 has in memory; its buffers are counted as all others.

    Attributes:
        peak: The largest sum so far.
        gathered: The part of `gathering` in it.
    """

    def __init__(self, given: tuple[torch.Tensor, ...], gathering: Gathering | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._gathering = gathering
        self.gathered = 0
        self._known = {one.untyped_storage()._cdata for one in given}  # noqa: SLF001 - its identity
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self._add(one.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()  # noqa: SLF001 - its identity
        if key in self._known:
            return
        self._known.add(key)
        self._now += size
        if self._now > self.peak:
            self.peak = self._now
            self.gathered = 0 if self._gathering is None else self._gathering.bytes()
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


class _HostMemory:
    """Takes the place of host memory for activations: notes sizes and keeps nothing."""

    def __init__(self) -> None:
        self.bytes = 0

    def offload(self) -> AbstractContextManager[Any]:
        return saved_tensors_hooks(
            self._pack, lambda packed: torch.empty(packed[0], dtype=packed[1], device=_META)
        )

    def _pack(self, tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
        self.bytes += tensor.nbytes
        return tensor.shape, tensor.dtype


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _on_meta(config: Any, section: TrainSection) -> Any:
    """The model in bf16, as FSDP2 has it in a pass, with attention by a kernel that takes boundaries."""
    implementation("segments", torch.device("cpu"), half=False)  # registers both
    with _META:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
        model.config._attn_implementation = VARLEN  # noqa: SLF001 - as `read_model` does
        model.train()
        recompute(model, section)
        if section.lora is not None:
            model = with_adapters(model, section.lora)
            if is_recomputed(section):
                model.enable_input_require_grads()
    return model


def _need(keys: dict[str, Any], section: TrainSection, gpus: int, model: Any, taken: Pass) -> Need:
    whole = sum(one.numel() for one in model.parameters())
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    weights, gradients = _SINGLE * whole // gpus, _SINGLE * trained // gpus
    all_moments = moment_bytes(section, updating=True) * trained // gpus
    moments = moment_bytes(section) * trained // gpus
    host = taken.host
    if section.optimizer_offload:
        moments, host = 0, host + moments
    gathered = taken.gathered if gpus > 1 else _HALF * whole  # one GPU: autocast keeps copies in bf16
    activations = taken.peak - taken.gathered
    in_passes = gathered + activations + moments
    return Need(
        keys=keys,
        weights=weights,
        gradients=gradients,
        moments=moments,
        gathered=gathered,
        activations=activations,
        total=weights + gradients + max(in_passes, all_moments) + OTHER_BYTES,
        host=host,
    )


def plan_json(
    model: str, section: TrainSection, gpus: int, gpu_bytes: int | None, needs: Sequence[Need]
) -> bytes:
    """One JSON object; the first of `needs` is the configuration's. Without `gpu_bytes`, `fits` is null."""
    return orjson.dumps(
        {
            "model": model,
            "seq_len": section.seq_len,
            "gpus": gpus,
            "gpu_memory_bytes": gpu_bytes,
            "needs": [
                {"keys": one.keys}
                | {f"{part}_bytes": value for part, value in _parts(one).items()}
                | {"fits": None if gpu_bytes is None else one.total <= gpu_bytes}
                for one in needs
            ],
        }
    )


def print_plan(
    model: str, section: TrainSection, gpus: int, gpu_bytes: int | None, needs: Sequence[Need]
) -> None:
    """Print the table to stdout."""
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("")
    for number in range(len(needs)):
        table.add_column("configured" if number == 0 else "or", justify="right")
    for key in needs[0].keys:
        table.add_row(key, *(str(one.keys[key]).lower() for one in needs))
    table.add_section()
    for part in _PARTS:
        table.add_row(part, *(f"{_parts(one)[part] / _GB:.1f}" for one in needs))
    if gpu_bytes is not None:
        table.add_row("fits", *("yes" if one.total <= gpu_bytes else "no" for one in needs))
    console = Console(highlight=False)
    of_size = "" if gpu_bytes is None else f" of {gpu_bytes / _GB:.0f} GB"
    console.print(
        f"GB on each of {gpus} GPUs{of_size}: {visible(model)}, rows of {section.seq_len:,} tokens",
        soft_wrap=True,
    )
    console.print(table)
    console.print(
        f"total: weights + gradients + what is larger of the passes (moments, gathered, activations) and the "
        f"optimizer's step, + {OTHER_BYTES / _GB:.0f} GB for CUDA and NCCL. The row is one sample, all of it "
        "targets. host: memory for what is offloaded, for each GPU.",
        soft_wrap=True,
    )


def _parts(need: Need) -> dict[str, int]:
    values = asdict(need)
    return {part: values[part] for part in _PARTS}
