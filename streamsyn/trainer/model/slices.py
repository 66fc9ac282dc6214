"""Reads a model that FSDP2 shards: each rank only the slices of the weights that it will hold.

The model is built with weights that nothing has written to, which take no memory, is sharded, and then read.
That needs files whose tensors are those of the model, name by name. transformers renames, splits or joins
the tensors of some models while it reads them; those are read whole by every rank, as without FSDP2.
"""

import warnings
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.initialization import no_init_weights

from streamsyn.errors import ConfigError
from streamsyn.plain_text import message

_ADAPTED = "base_model.model."
"""What peft puts before the names of a model."""


class SlicedWeights:
    """The files of a model, to be read slice by slice.

    Args:
        folder: A Hugging Face directory for which `can_be_sliced` holds.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def empty_model(self, attention: str | None = None) -> Any:
        """The model in float32, with weights of any value.

        Args:
            attention: Name of the attention implementation; None for the model's own.
        """
        config = AutoConfig.from_pretrained(self._folder)
        chosen = {} if attention is None else {"attn_implementation": attention}
        with no_init_weights():
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **chosen)
        model.tie_weights()
        if (self._folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(self._folder)
        return model

    def read_into(self, model: Any) -> None:
        """Read what this rank holds of a sharded model, with or without adapters. Nothing is exchanged.

        Raises:
            ConfigError: The files are damaged.
        """
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        tensors = {name: one.detach() for name, one in _tensors(model).items()}
        try:
            load(tensors, storage_reader=HuggingFaceStorageReader(str(self._folder)), no_dist=True)
        except (Exception, CheckpointException) as error:
            # torch and safetensors raise all kinds for a damaged file.
            raise ConfigError(
                f"--model {self._folder}: its weights cannot be read: {message(str(error))}"
            ) from error


def can_be_sliced(path: str) -> bool:
    """Whether `path` is a directory of safetensors with the names of the model's own tensors."""
    names = _names_in(Path(path))
    if not names:
        return False
    with torch.device("meta"):
        model = SlicedWeights(Path(path)).empty_model()
    tensors = _tensors(model)
    converted = get_model_conversion_mapping(model, add_legacy=False)
    return not converted and names >= tensors.keys() and all(one.ndim for one in tensors.values())


def _names_in(folder: Path) -> frozenset[str]:
    """The names of the tensors in a model's safetensors; empty without any, or with others beside them."""
    index = folder / "model.safetensors.index.json"
    try:
        if index.exists():
            files = orjson.loads(index.read_bytes())["weight_map"]
        else:
            with safe_open(folder / "model.safetensors", "pt") as file:
                files = dict.fromkeys(file.keys(), "model.safetensors")
        # DCP reads all there are.
        alone = {*files.values()} == {path.name for path in folder.glob("*.safetensors")}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return frozenset()  # transformers reads it in a different way, or says what is wrong
    return frozenset(files) if alone else frozenset()


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    """The weights and persistent buffers that files hold, by their names there; a shared one has one name."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, one in model.state_dict(keep_vars=True).items():
        if ".lora_" not in name:
            found.setdefault(id(one), (name.removeprefix(_ADAPTED).replace(".base_layer", ""), one))
    return dict(found.values())
