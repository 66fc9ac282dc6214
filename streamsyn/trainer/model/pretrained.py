"""Whether a tokenizer, a model and `train.seq_len` go together: asked before any weight is read.

Memory that does not suffice: one line with the keys that need less.

The model that is tuned, and its tokenizer: read, seen to be whole and savable, fitted with adapters.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import structlog
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from streamsyn.config.train_section import TrainSection
from streamsyn.errors import ConfigError
from streamsyn.trainer.model.adapters import with_adapters
from streamsyn.trainer.model.attention import implementation

log = structlog.get_logger()

_ROTARY = ("rope_theta", "rope_parameters", "rope_scaling")


def check_compatibility(path: str, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> None:
    """See whether the model has an embedding for each token, and a position for each place in a row.

    A model with rotary positions goes on beyond those it knows, more or less well: that is said, no more.

    Raises:
        ConfigError: It has not.
    """
    config = AutoConfig.from_pretrained(path).get_text_config()
    highest = max(tokenizer.get_vocab().values(), default=-1)
    embeddings = getattr(config, "vocab_size", None)
    if isinstance(embeddings, int) and highest >= embeddings:
        raise ConfigError(
            f"--model {path}: its tokenizer has token {highest}, and the model embeddings for {embeddings} "
            f"tokens: they do not belong together"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions >= seq_len:
        return
    if not _is_rotary(config):
        raise ConfigError(f"train.seq_len: {seq_len} tokens, and --model {path} has {positions} positions")
    log.warning(
        "train.beyond_positions",
        seq_len=seq_len,
        known_positions=positions,
        why="what lies beyond is extrapolated: set rope scaling in its config.json, or a lower train.seq_len",
    )


def _is_rotary(config: Any) -> bool:
    return any(getattr(config, name, None) is not None for name in _ROTARY)


@contextmanager
def memory_errors_explained(section: TrainSection) -> Iterator[None]:
    """Turn what torch raises when memory is short into a line.

    Raises:
        ConfigError: There was not enough.
    """
    try:
        yield
    except RuntimeError as error:
        # On CPU it is a RuntimeError like any other.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        further = [] if section.gradient_checkpointing else ["train.gradient_checkpointing = true"]
        further += [] if section.lora is not None else ["train.lora"]
        raise ConfigError(
            f"out of memory, with rows of train.seq_len = {section.seq_len} tokens: try fewer"
            f"{''.join(f', {one}' for one in further)}, or more GPUs (deploy/accelerate)"
        ) from error


def read_tokenizer(path: str, template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the model at `path`; with a chat template, if one is given, in place of its own.

    Raises:
        ConfigError: There is none, or it cannot be saved again.
    """
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # each try is told; our line says how it ended
    transformers_logging.disable_progress_bar()
    with _refused(f"--model {path}: no tokenizer can be read there"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    if template is not None:
        tokenizer.chat_template = template
    with _refused(f"--model {path}: its tokenizer cannot be saved again"), TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
    return tokenizer


def read_model(
    path: str, section: TrainSection, accelerator: Accelerator, adapter: Path | None, *, seed: int
) -> Any:
    """The model at `path`, in float32, with what `section` adds to it.

    Args:
        path: A directory as `save_pretrained` writes it, or a name on the hub.
        section: Which attention, whether adapters.
        accelerator: Says on which device it will run.
        adapter: A directory of adapters to go on with.
        seed: `run.seed`, from which adapters begin that go on from none.

    Raises:
        ConfigError: There is none, or it cannot be used, or not be saved again.
    """
    half = accelerator.mixed_precision == "bf16"
    attention = implementation(section.attention, accelerator.device, half=half)
    with _refused(f"--model {path}: cannot be read"):
        read: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
        )
    model, found = read
    if missing := sorted(found["missing_keys"]):  # which would be random
        raise ConfigError(f"--model {path}: {len(missing)} of its weights are missing: {missing[0]}, ...")
    _check_savable(model, path)
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if section.lora is not None:
        torch.manual_seed(seed % 2**63)
        model = with_adapters(model, section.lora, adapter)
        if section.gradient_checkpointing:
            model.enable_input_require_grads()
    return model


def _check_savable(model: Any, path: str) -> None:
    """See whether what goes beside the weights can be saved, before a checkpoint needs it.

    Many models have a temperature and no `do_sample`: that is read, and saved with `do_sample` alone. A
    temperature of 0 cannot be sampled with.

    Raises:
        ConfigError: It cannot.
    """
    generation = getattr(model, "generation_config", None)
    with TemporaryDirectory() as folder:
        with _refused(f"--model {path}: its config.json cannot be saved again"):
            model.config.save_pretrained(folder)
        if generation is None:
            return
        try:
            generation.save_pretrained(folder)
        except ValueError:
            with _refused(f"--model {path}: its generation_config.json cannot be saved again"):
                generation.do_sample = True if generation.temperature != 0 else generation.do_sample
                generation.save_pretrained(folder)
            log.warning("train.generation_config", do_sample=True, why="it has values for sampling alone")


def model_dtype(path: str) -> torch.dtype:
    """In what the weights at `path` are kept.

    Raises:
        ConfigError: It is no model.
    """
    with _refused(f"--model {path} is no model"):
        dtype = getattr(AutoConfig.from_pretrained(path), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Whatever is raised within is said of `what`: transformers raises errors of any kind over a bad file."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"{what}: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    """The first line, and the next where it only announces that; the kind, where it may say too little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    if said and isinstance(error, OSError | ValueError | RuntimeError | ImportError):
        return said
    return f"{type(error).__name__}: {said}"
