"""Reads the model to tune and its tokenizer, and refuses in one line what cannot be trained or saved.

Cheap checks come first: the tokenizer, the configuration, `train.seq_len`. Then the weights are read, checked
for completeness and given LoRA adapters, which are merged into the weights of the result.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import structlog
import torch
from accelerate import Accelerator
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from streamsyn.config.command_sections import LoraSection, TrainSection
from streamsyn.errors import ConfigError
from streamsyn.trainer.model.activations import is_recomputed, recompute
from streamsyn.trainer.model.attention import implementation
from streamsyn.trainer.model.placed import Placed
from streamsyn.trainer.model.slices import SlicedWeights, can_be_sliced

_ADAPTER = "default"
_KEY = "train.lora.targets"


def with_adapters(model: Any, lora: LoraSection) -> Any:
    """Add new adapters to a model.

    Args:
        model: A model of transformers.
        lora: `train.lora`: rank, scale and target modules.

    Raises:
        ConfigError: `train.lora.targets` does not fit the model.
    """
    import peft

    _check_targets(model, lora.targets)
    targets = list(lora.targets) or "all-linear"
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM"
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"{_KEY}: {error}") from error


def merged(placed: Placed, weights: dict[str, Any]) -> tuple[Placed, dict[str, Any]]:
    """Return the model without its adapters, and weights with the adapters merged: W + scale * B A.

    The model itself does not change and can go on training. peft's `merge_and_unload` would remove the
    adapters from it, and needs all weights on one rank. A model without adapters is returned unchanged.

    Args:
        placed: The model in training.
        weights: Whole weights: all, or a part from `placed.whole_layers`.
    """
    if not hasattr(placed.plain, "merge_and_unload"):
        return placed, weights
    plain = placed.plain.get_base_model()
    whole = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in weights.items()
        if ".lora_" not in name
    }
    for name, layer in plain.named_modules():
        if _ADAPTER in getattr(layer, "lora_A", ()):
            key = f"{name.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"
            weight = whole.get(key)
            if weight is None:  # of a different part
                continue
            delta = _delta(weights, f"base_model.model.{name}", layer).to(weight.device)
            whole[key] = (weight.float() + delta).to(weight.dtype)
    return replace(placed, plain=plain), whole


def _delta(weights: dict[str, Any], name: str, layer: Any) -> torch.Tensor:
    """What the adapter of one layer adds to its weight."""
    down = weights[f"{name}.lora_A.{_ADAPTER}.weight"].detach().float()
    up = weights[f"{name}.lora_B.{_ADAPTER}.weight"].detach().float()
    experts = getattr(layer, "num_experts", 1)  # peft wraps the stacked weight of all experts as one layer
    if experts > 1:
        parts = down.reshape(experts, -1, down.shape[-1]), up.reshape(up.shape[0], -1, experts)
        swapped = layer._did_swap_in_out_features  # noqa: SLF001 - peft has no public name for it
        order = "eoi" if swapped else "eio"
        stacked: torch.Tensor = torch.einsum(f"eri,ore->{order}", *parts)
        return stacked * float(layer.scaling[_ADAPTER])
    delta: torch.Tensor = (up @ down) * float(layer.scaling[_ADAPTER])
    return delta.T if layer.fan_in_fan_out else delta


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    """Check that each target names linear modules, by their whole name or its end.

    Raises:
        ConfigError: No module has the name; a module is not linear; or it shares its weight with another
            module, as a head often does with the embedding: the merged adapter would change both.
    """
    modules = dict(model.named_modules())
    for target in targets:
        named = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not named:
            raise ConfigError(f"{_KEY}: the model has no module {target!r}")
        for name in named:
            module = modules[name]
            if not isinstance(module, torch.nn.Linear | Conv1D):
                kind = type(module).__name__
                raise ConfigError(f"{_KEY}: {name} is not a linear module but {kind}")
            if others := [n for n, one in modules.items() if n != name and _weight(one) is module.weight]:
                raise ConfigError(
                    f"{_KEY}: {name} shares its weight with {others[0]}, and cannot have its own adapter"
                )


def _weight(module: torch.nn.Module) -> object:
    return getattr(module, "weight", None)


log = structlog.get_logger()

_ROTARY = ("rope_theta", "rope_parameters", "rope_scaling")


def check_compatibility(path: str, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> None:
    """Check that the model has an embedding for each token, and positions for `train.seq_len`.

    A model with rotary positions extrapolates beyond those it knows: that only logs a warning.

    Raises:
        ConfigError: It is not a causal language model, the tokenizer has more tokens than the model, or the
            model has too few positions or frequencies that depend on other rows.
    """
    whole = AutoConfig.from_pretrained(path)
    if whole.is_encoder_decoder or type(whole) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"--model {path} is not a causal language model, but {whole.model_type}: only models that "
            "transformers' AutoModelForCausalLM reads can be tuned"
        )
    config = whole.get_text_config()
    highest = max(tokenizer.get_vocab().values(), default=-1)
    embeddings = getattr(config, "vocab_size", None)
    if isinstance(embeddings, int) and highest >= embeddings:
        raise ConfigError(
            f"--model {path}: its tokenizer has token {highest}, but the model has embeddings for "
            f"{embeddings} tokens: use the tokenizer that belongs to the model"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions >= seq_len:
        return
    if any("dynamic" in kind for kind in _rope_types(config)):
        raise ConfigError(
            f"train.seq_len: {seq_len} is more than the {positions} positions of --model {path}, beyond "
            "which its rotary frequencies (rope_type dynamic) depend on the longest row before; use a "
            "different rope_type in its config.json, such as yarn, or a lower train.seq_len"
        )
    if not _is_rotary(config):
        raise ConfigError(
            f"train.seq_len: {seq_len} is more than the {positions} positions of --model {path}"
        )
    log.warning(
        "train.beyond_positions",
        seq_len=seq_len,
        known_positions=positions,
        why="later positions are extrapolated: set rope scaling in its config.json, or a lower train.seq_len",
    )


def _rope_types(config: Any) -> list[str]:
    """The kinds of rotary frequencies, of all types of layers."""
    given = getattr(config, "rope_parameters", None) or {}
    return [one.get("rope_type", "") for one in (given, *given.values()) if isinstance(one, dict)]


def _is_rotary(config: Any) -> bool:
    return any(getattr(config, name, None) is not None for name in _ROTARY)


@contextmanager
def memory_errors_explained(section: TrainSection) -> Iterator[None]:
    """Turn out-of-memory errors into one line that names the keys that would help.

    Raises:
        ConfigError: There was not enough memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # On CPUs torch raises a plain RuntimeError.
        of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not of_memory and "DefaultCPUAllocator" not in str(error):
            raise
        raise ConfigError(
            f"out of memory, with rows of train.seq_len = {section.seq_len} tokens: try {_savings(section)}"
        ) from error


def _savings(section: TrainSection) -> str:
    """What would save memory and is not set, the cheapest first."""
    keys = {
        "train.gradient_checkpointing = true": section.gradient_checkpointing == "selective"
        or not is_recomputed(section),
        "train.optimizer_offload = true": not section.optimizer_offload,
        "train.activation_offload = true": not section.activation_offload,
        "train.lora": section.lora is None,
    }
    return ", ".join(
        [
            *(key for key, helps in keys.items() if helps),
            "more GPUs (deploy/accelerate)",
            "or a lower train.seq_len",
        ]
    )


def read_tokenizer(path: str, template: str | None = None) -> PreTrainedTokenizerBase:
    """Read the tokenizer of the model at `path`.

    Args:
        path: A directory, or a name on the Hugging Face hub.
        template: A chat template to use instead of the tokenizer's own.

    Raises:
        ConfigError: There is no tokenizer, or it cannot be saved again.
    """
    transformers_logging.set_verbosity_error()
    # The hub logs each failed attempt; our error reports the outcome.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    with refused(f"--model {path}: its tokenizer cannot be read"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    if template is not None:
        tokenizer.chat_template = template
    with refused(f"--model {path}: its tokenizer cannot be saved again"), TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
    return tokenizer


def read_model(
    path: str,
    section: TrainSection,
    accelerator: Accelerator,
    *,
    seed: int,
    sliced: SlicedWeights | None = None,
) -> Any:
    """Read the model at `path` in float32, with attention, checkpointing and adapters as configured.

    Args:
        path: A directory that `save_pretrained` wrote, or a name on the Hugging Face hub.
        section: `train`.
        accelerator: Knows the device and the precision.
        seed: `run.seed`, which initialises new adapters.
        sliced: If given, the weights are not read: `place` reads them once the model is sharded.

    Raises:
        ConfigError: The model cannot be read, used or saved again.
    """
    half = accelerator.mixed_precision == "bf16"
    attention = implementation(section.attention, accelerator.device, half=half)
    with refused(f"--model {path}: cannot be read"):
        model = _read_whole(path) if sliced is None else sliced.empty_model("eager")
    # Set afterwards: models with attention classes of their own do not know the name.
    model.config._attn_implementation = attention  # noqa: SLF001 - there is no public name for it
    _check_savable(model, path)
    recompute(model, section)
    if section.lora is not None:
        torch.manual_seed(seed % 2**63)
        model = with_adapters(model, section.lora)
        if is_recomputed(section):
            model.enable_input_require_grads()
    return model


def sliced_weights(path: str, accelerator: Accelerator) -> SlicedWeights | None:
    """What each rank reads its part of the weights from; None if every rank reads all of them.

    Raises:
        ConfigError: It is not a model of transformers.
    """
    if not accelerator.is_fsdp2:
        return None
    with refused(f"--model {path}: cannot be read"):
        return SlicedWeights(Path(path)) if can_be_sliced(path) else None


def _read_whole(path: str) -> Any:
    read: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, found = read
    if missing := sorted(found["missing_keys"]):  # transformers would initialise them at random
        raise ConfigError(f"--model {path}: {len(missing)} of its weights are missing: {missing[0]}, ...")
    return model


def _check_savable(model: Any, path: str) -> None:
    """Check that config.json and generation_config.json can be saved, before a checkpoint needs them.

    Many generation configurations have a temperature without `do_sample`. transformers reads but does not
    save those, so `do_sample` is set, except with a temperature of 0, which cannot be sampled with.

    Raises:
        ConfigError: One of them cannot be saved.
    """
    generation = getattr(model, "generation_config", None)
    with TemporaryDirectory() as folder:
        with refused(f"--model {path}: its config.json cannot be saved again"):
            model.config.save_pretrained(folder)
        if generation is None:
            return
        try:
            generation.save_pretrained(folder)
        except ValueError:
            with refused(f"--model {path}: its generation_config.json cannot be saved again"):
                generation.do_sample = True if generation.temperature != 0 else generation.do_sample
                generation.save_pretrained(folder)
            log.warning("train.generation_config", do_sample=True, why="it has values that need do_sample")


def model_dtype(path: str) -> torch.dtype:
    """The precision of the weights at `path`; float32 if its config.json does not say.

    Raises:
        ConfigError: It is not a model of transformers.
    """
    with refused(f"--model {path} is not a model that transformers reads"):
        dtype = getattr(AutoConfig.from_pretrained(path), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn any error into a ConfigError that begins with `what`: transformers raises all kinds."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{what}: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    """The first line, and the next one after a colon; with the class if it is an unusual error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    if text and isinstance(error, OSError | ValueError | RuntimeError | ImportError):
        return text
    return f"{type(error).__name__}: {text}"
