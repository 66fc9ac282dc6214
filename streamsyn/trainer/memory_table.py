"""The plan of `train --plan` as a table for people, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict

import orjson
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from streamsyn.config.command_sections import TrainSection
from streamsyn.plain_text import visible
from streamsyn.trainer.memory_plan import OTHER_BYTES, Need

_GB = 1e9
_PARTS = ("weights", "gradients", "moments", "gathered", "activations", "total", "host")


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
