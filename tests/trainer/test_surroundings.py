"""Where a rank finds itself: what a launcher says, and memory that is short."""

import re
from typing import Any

import pytest
import torch

from streamsyn.config.command_sections import LoraSection, TrainSection
from streamsyn.errors import ConfigError
from streamsyn.trainer.model.pretrained import memory_errors_explained
from streamsyn.trainer.training import place_among_ranks


def test_the_launcher_sets_the_rank() -> None:
    """Without a launcher there is a single rank."""
    launched = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1"}

    assert (0, 1) == place_among_ranks({})
    assert (1, 4) == place_among_ranks(launched)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "x"}, "RANK and WORLD_SIZE must be numbers, not 'x' and '1'"),
        ({"WORLD_SIZE": "-2"}, "RANK and WORLD_SIZE must be numbers, not '0' and '-2'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
    ],
)
def test_stale_variables_of_a_launcher_are_named(environ: dict[str, str], message: str) -> None:
    """Variables that were exported once: one line, not an error of torch."""
    with pytest.raises(ConfigError, match=message):
        place_among_ranks(environ)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"gradient_checkpointing": True},
            None,
            "= 4096 tokens: try train.optimizer_offload = true, train.activation_offload = true",
        ),
        (
            {"lora": LoraSection(), "optimizer_offload": True},
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            "= 4096 tokens: try train.gradient_checkpointing = true, train.activation_offload = true, more",
        ),
        (
            {"seq_len": 8192, "activation_offload": True, "optimizer_offload": True, "lora": LoraSection()},
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            "= 8192 tokens: try more GPUs (deploy/accelerate), or a lower train.seq_len",
        ),
    ],
)
def test_out_of_memory_is_one_line_with_keys(
    given: dict[str, Any], error: Exception | None, message: str
) -> None:
    """It names keys that need less memory and are not set already; simulated for a GPU, real on the CPU."""

    def run_out() -> None:
        if error is not None:
            raise error
        torch.empty(1 << 50)

    section = TrainSection(**{"seq_len": 4096, **given})
    with pytest.raises(ConfigError, match=re.escape(message)), memory_errors_explained(section):
        run_out()


def test_other_errors_are_unchanged() -> None:
    """They are bugs of ours."""
    with pytest.raises(RuntimeError, match="size mismatch"), memory_errors_explained(TrainSection()):
        raise RuntimeError("size mismatch")
