"""The model that is tuned: placed on its devices, with its optimizer, and written."""

from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import AutoConfig, PreTrainedTokenizerBase

from streamsyn.errors import ConfigError
from streamsyn.sections import TrainSection
from streamsyn.trainer.model import zero
from streamsyn.trainer.model.apart import check_apart


@dataclass(frozen=True, slots=True)
class Placed:
    """A model on its devices.

    Attributes:
        accelerator: Who placed it.
        model: What is called; under several ranks a wrapper.
        plain: The model itself.
        optimizer: AdamW over what is trained.
        dtype: That of the weights as they were found, in which the result is written.
    """

    accelerator: Accelerator
    model: Any
    plain: Any
    optimizer: Any
    dtype: torch.dtype


def place(model: Any, section: TrainSection, accelerator: Accelerator, dtype: torch.dtype) -> Placed:
    """Put the model on its devices, with its optimizer.

    Raises:
        ConfigError: The model cannot be trained on packed samples, or not so.
    """
    model.train()
    _freeze_towers(model)
    if accelerator.is_fsdp2:
        _name_layers(model, accelerator)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [one for one in trained if one.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [one for one in trained if one.ndim <= 1], "weight_decay": 0.0},  # norms and biases
    ]
    optimizer: Any = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.learning_rate,
        betas=section.betas,
        # DeepSpeed steps on flat shares; on those that lie with the host, by an AdamW of its own.
        fused=accelerator.distributed_type != DistributedType.DEEPSPEED,
    )
    shares: zero.Shares = {}
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        lowered = accelerator.mixed_precision == "bf16" and dtype != torch.bfloat16
        if lowered and not all(one.requires_grad for one in model.parameters()):
            raise ConfigError(
                f"DeepSpeed would leave what is not trained of the model, which is in {dtype}, in bf16 (with "
                "train.lora, or a tower for pictures): use FSDP2 or DDP, or train.precision = fp32"
            )
        rank, world = accelerator.process_index, accelerator.num_processes
        shares = {name: zero.share_of(one.detach(), rank, world) for name, one in zero.trained(model)}
    prepared, optimizer = accelerator.prepare(model, optimizer)
    plain: Any = accelerator.unwrap_model(prepared)
    if shares:
        zero.give_weights(plain, shares)
    _leave_logits(plain, accelerator)
    check_apart(prepared, accelerator.device, half=accelerator.mixed_precision == "bf16")
    return Placed(accelerator, prepared, plain, optimizer, dtype)


def _freeze_towers(model: Any) -> None:
    """Ask for no gradient of what is for pictures and sounds alone: there is none, and DDP waits for it."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if plain.config.get_text_config() is plain.config:
        return
    used = {one for part in (plain.get_decoder(), plain.get_output_embeddings()) for one in part.parameters()}
    for parameter in model.parameters():
        if parameter not in used:
            parameter.requires_grad_(False)


def _name_layers(model: Any, accelerator: Accelerator) -> None:
    """Leave out layers that a model names and does not have, which accelerate refuses."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        there = {type(one).__name__ for one in model.modules()}
        named = getattr(model, "_no_split_modules", None) or ()
        plugin.transformer_cls_names_to_wrap = [name for name in named if name in there]


def _leave_logits(plain: Any, accelerator: Accelerator) -> None:
    """Take off what makes all that comes out of the model float32, and keep autocast.

    Logits would be there whole a second time, twice as large; losses go to float32 part by part. Under DDP
    the wrapper around the model calls its forward pass, whatever that is. FSDP2 and DeepSpeed are not
    changed so by accelerate. (`unwrap_model` can take it off too, with transformers' own decorators.)
    """
    original = plain.__dict__.pop("_original_forward", None)
    if original is None:
        return

    @wraps(original)
    def forward(*given: Any, **named: Any) -> Any:
        with accelerator.autocast():
            return original(*given, **named)

    plain.forward = forward


def write_model(
    placed: Placed, weights: dict[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write a directory that `from_pretrained` reads: weights as given, configuration, tokenizer."""
    placed.plain.save_pretrained(folder, state_dict=weights)
    _write_tokenizer(tokenizer, folder)


def write_result(
    placed: Placed, weights: dict[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """As `write_model`, in the precision that the model had at first."""
    tied = placed.plain.all_tied_weights_keys  # copies would no longer be known for the same
    lowered = {
        name: value.to(placed.dtype) if value.is_floating_point() else value
        for name, value in weights.items()
        if name not in tied
    }
    placed.plain.save_pretrained(folder, state_dict=lowered)
    # It has noted the precision that the model was trained in.
    config = AutoConfig.from_pretrained(folder)
    config.dtype = placed.dtype
    config.save_pretrained(folder)
    _write_tokenizer(tokenizer, folder)


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # tokenizers raises no other kind, whatever has happened; mostly the disk is full.
        raise OSError(f"the tokenizer cannot be written: {error}") from error
