"""One round of one side of `benchmarks.train`, in its own process.

    python -m benchmarks.train_sides SIDE FOLDER

FOLDER holds the model and plan.json. SIDE is `ours` or `trl` and an attention implementation, such as
`ours-segments`, `ours-varlen` or `trl-sdpa`; `auto` takes the fastest that is installed. `-fp32` behind it
trains in float32 whatever the plan says, `-8bit` with moments of 8 bits, `-compile` with compiled layers.
Losses, step times and peak memory go to stdout as one JSON object.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

RATE = 1e-3


def tokens_of(row: list[tuple[int, int]], number: int, vocabulary: int) -> list[list[int]]:
    """Return the tokens of a row's samples, drawn from a 64th of the vocabulary so that the loss can fall."""
    import random

    rng = random.Random(number)
    return [[rng.randrange(vocabulary // 64) for _ in range(size)] for size, _ in row]


def clock(gpu: bool) -> float:
    """Return the CPU seconds of this process; with `gpu`, wall seconds after the GPU has finished."""
    import torch

    if not gpu:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(gpu: bool) -> int:
    """Return the peak memory of the GPU, or of this process, in bytes."""
    import torch

    if gpu:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def best_flash() -> str:
    """Return transformers' name of the fastest attention that is installed for packed rows."""
    installed = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}
    return next((name for name, package in installed.items() if find_spec(package)), "sdpa")


def ours(
    folder: Path, plan: dict[str, Any], attention: str, keys: Sequence[str] = ()
) -> tuple[list[float], list[float]]:
    """Train with streamsyn's loop and return the losses and the seconds of its steps; `keys` is what stands
    behind the attention.
    """
    import numpy

    from streamsyn.config.command_sections import TrainSection
    from streamsyn.trainer.commands import Command, Ranks, Step, Stop
    from streamsyn.trainer.examples import Example, Key
    from streamsyn.trainer.loop import Loop, Progress
    from streamsyn.trainer.model.loss import denominator, target_weights
    from streamsyn.trainer.model.placed import place, start_accelerator
    from streamsyn.trainer.model.pretrained import model_dtype, read_model, read_tokenizer
    from streamsyn.trainer.saving.store import Store

    per_step, gpu = plan["per_step"], plan["gpu"]
    section = TrainSection.model_validate(
        {
            "rows_per_step": per_step,
            "learning_rate": RATE,
            "betas": [0.9, 0.999],
            "loss": "token",
            "precision": "bf16" if plan["half"] else "fp32",
            "gradient_checkpointing": plan["checkpointing"],
            "attention": "segments" if attention == "sdpa" else attention,
            "moments": "8bit" if "8bit" in keys else "fp32",
            "compile": "compile" in keys,
        }
    )
    accelerator = start_accelerator(section)
    model = read_model(str(folder), section, accelerator, seed=0)
    if attention == "sdpa":
        model.set_attn_implementation("sdpa")
    placed = place(model, section, accelerator, model_dtype(str(folder)))
    ranks = Ranks(0, 1)
    store = Store(folder / "ours", section, read_tokenizer(str(folder), None), ranks)  # nothing is saved
    loop = Loop(placed, ranks, section, 0, store, Progress())
    losses: list[float] = []
    times: list[float] = []

    def commands() -> Iterator[list[Command]]:
        rows = []
        for number, row in enumerate(plan["rows"]):
            texts = tokens_of(row, number, plan["vocabulary"])
            rows.append(
                tuple(
                    Example(Key("b", 0, number), "", "", numpy.array(text, dtype=numpy.int32), size - targets)
                    for text, (size, targets) in zip(texts, row, strict=True)
                )
            )
        for first in range(0, len(rows), per_step):
            step_rows = tuple(rows[first : first + per_step])
            weights = tuple(target_weights(row, "token") for row in step_rows)
            started = clock(gpu)
            yield [Step(step_rows, weights, denominator(step_rows, "token"), RATE)]
            times.append(clock(gpu) - started)
            losses.append(loop.progress.loss)
        yield [Stop()]

    loop.run(commands())
    return losses, times


def trl_rows(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the packs in the format of TRL's own packing."""
    rows = []
    for number, row in enumerate(plan["rows"]):
        texts = tokens_of(row, number, plan["vocabulary"])
        labels = [
            [-100] * (size - targets) + text[size - targets :]
            for text, (size, targets) in zip(texts, row, strict=True)
        ]
        rows.append(
            {
                "input_ids": [*chain(*texts)],
                "labels": [*chain(*labels)],
                "seq_lengths": [size for size, _ in row],
            }
        )
    return rows


def theirs(folder: Path, plan: dict[str, Any], attention: str) -> tuple[list[float], list[float]]:
    """Train with TRL's SFTTrainer on the same packs; returns like `ours`."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times: list[float] = []
    losses: list[float] = []

    class Watch(TrainerCallback):
        started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            Watch.started = clock(plan["gpu"])

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(clock(plan["gpu"]) - Watch.started)

        def on_log(self, *_: Any, **given: Any) -> None:
            if "loss" in given["logs"]:
                losses.append(given["logs"]["loss"])

    config = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=plan["per_step"],
        num_train_epochs=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        packing=True,
        max_length=plan["length"],
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
        gradient_checkpointing=plan["checkpointing"],
        bf16=plan["half"],
        use_cpu=not plan["gpu"],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=plan["gpu"],
    )
    if attention == "auto":
        attention = best_flash() if plan["gpu"] else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(trl_rows(plan)),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Watch()],
    )
    trainer.train()
    return losses, times


def worker(side: str, folder: Path) -> None:
    """Run one round of one side and print its figures as JSON."""
    import torch

    plan = json.loads((folder / "plan.json").read_text())
    if not plan["gpu"]:
        torch.set_num_threads(1)
    name, attention, *keys = side.split("-")
    plan["half"] &= "fp32" not in keys
    if name == "ours":
        losses, times = ours(folder, plan, attention, keys)
    else:
        losses, times = theirs(folder, plan, attention)
    figures = {"losses": losses, "times": times, "peak_bytes": peak_bytes(plan["gpu"])}
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    worker(sys.argv[1], Path(sys.argv[2]))
