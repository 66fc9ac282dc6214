"""Writes the tuned model as a Hugging Face directory: OUT/model, and what is published.

The weights are gathered layer by layer and written file by file, so no rank holds all of them where FSDP2
shards them. Adapters are merged, and the precision is that of the model at first.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from streamsyn.trainer.model.placed import Placed, whole_layers
from streamsyn.trainer.model.pretrained import merged
from streamsyn.trainer.saving.checkpoint import write_folder

FILE_BYTES = 4_000_000_000
"""The largest size of a file of weights, unless one layer is larger. Rank 0 holds that much, and a layer."""
_INDEX = "model.safetensors.index.json"


def write_result(placed: Placed, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Write the model that is being tuned to the directory `target`, whole or not at all. All ranks must
    call it; rank 0 writes.

    Raises:
        SinkError: It cannot be written. On rank 0 only.
    """
    layers = whole_layers(placed)
    try:
        if placed.accelerator.is_main_process:
            write_folder(target, lambda folder: _write(placed, layers, tokenizer, folder))
    finally:
        for _ in layers:  # the other ranks gather them too, whatever has gone wrong on this one
            pass


def _write(
    placed: Placed,
    layers: Iterable[dict[str, torch.Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    plain = merged(placed, {})[0].plain
    plain.save_pretrained(folder, state_dict={})  # all but the weights
    # It has recorded the precision of training.
    config = AutoConfig.from_pretrained(folder)
    config.dtype = placed.dtype
    config.save_pretrained(folder)
    files = _Files(folder)
    for layer in layers:
        whole = merged(placed, layer)[1]
        # Converted copies of tied weights would no longer be recognised as shared.
        left_out = {*plain.all_tied_weights_keys, *(plain._keys_to_ignore_on_save or ())}  # noqa: SLF001
        lowered = {
            name: value.to(placed.dtype) if value.is_floating_point() else value
            for name, value in whole.items()
            if name not in left_out
        }
        files.add(revert_weight_conversion(plain, lowered))
    files.finish()
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # tokenizers raises a bare Exception whatever the cause; usually the disk is full.
        raise OSError(f"the tokenizer cannot be written: {error}") from error


class _Files:
    """Collects tensors, and writes a file whenever there is enough for one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, torch.Tensor] = {}
        self._held_bytes = 0
        self._written: list[list[str]] = []
        """The names in each file."""
        self._total_bytes = 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        size = sum(one.nbytes for one in tensors.values())
        if self._held and self._held_bytes + size > FILE_BYTES:
            self._write()
        self._held |= {name: one.contiguous() for name, one in tensors.items()}
        self._held_bytes += size

    def finish(self) -> None:
        """Write the last file; name the files, and index them if there are several."""
        self._write()
        count = len(self._written)
        if count == 1:
            self._file(0).rename(self._folder / "model.safetensors")
            return
        index: dict[str, Any] = {"metadata": {"total_size": self._total_bytes}, "weight_map": {}}
        for number, names in enumerate(self._written):
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._file(number).rename(self._folder / name)
            index["weight_map"] |= dict.fromkeys(names, name)
        (self._folder / _INDEX).write_bytes(orjson.dumps(index, option=orjson.OPT_INDENT_2))

    def _write(self) -> None:
        path = self._file(len(self._written))
        path.touch()
        mode = path.stat().st_mode
        save_file(self._held, path, {"format": "pt"})
        path.chmod(mode)  # as the umask says: safetensors lets only the owner read what it writes
        self._written.append([*self._held])
        self._total_bytes += self._held_bytes
        self._held, self._held_bytes = {}, 0

    def _file(self, number: int) -> Path:
        return self._folder / f"part-{number}"
