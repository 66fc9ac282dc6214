"""Our loop beside TRL's SFTTrainer: the same packs and the same model; tokens per CPU second.

    python -m benchmarks.train [--trl PYTHON] [--rounds N]

Both train a random Llama on the same rows of samples, on one thread, each in a process of its own, in turns;
the first steps are left out, and of all rounds the fastest counts. PYTHON is one that has trl besides torch,
transformers, accelerate and datasets; without it, only our side runs. On a GPU both run there, in bf16, with
a model of 0.5 billion weights and rows of --length tokens; then it is tokens a second of wall time, and the
share of an H100's or H200's dense bf16 peak (attention counted whole, over each sample's own tokens).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

WARM_UP = 3
PEAK_FLOPS = 989e12
RATE = 1e-3


def samples(rows: int, length: int) -> list[list[tuple[int, int]]]:
    """Rows of samples as (tokens, targets): about three to a row, answers of a few to some hundred tokens."""
    import random

    draw, made = random.Random(0), []
    for _ in range(rows):
        row, room = [], length
        while room > length // 8:
            size = min(room, draw.randint(length // 6, length // 2))
            row.append((size, min(size // 2, draw.choice([4, 8, 16, 64, 128]))))
            room -= size
        made.append(row)
    return made


def tokens_of(row: list[tuple[int, int]], number: int, vocabulary: int) -> list[list[int]]:
    """The tokens of a row's samples: from a small part of the vocabulary, which is what there is to learn."""
    import random

    draw = random.Random(number)
    return [[draw.randrange(vocabulary // 64) for _ in range(size)] for size, _ in row]


def model_config(gpu: bool) -> Any:
    """A Llama: 4 layers of 256 on CPU, 0.5 billion weights on a GPU."""
    from transformers import LlamaConfig

    names = [
        *("hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "vocab_size"),
    ]
    sizes = (1024, 4096, 24, 16, 8, 65_536) if gpu else (256, 1024, 4, 8, 4, 4096)
    chosen: dict[str, Any] = dict(zip(names, sizes, strict=True))
    return LlamaConfig(**chosen, max_position_embeddings=65_536)


def clock(gpu: bool) -> float:
    """CPU seconds of this process; on a GPU wall seconds, once it has done its work."""
    import torch

    if not gpu:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def ours(folder: Path, plan: dict[str, Any], attention: str) -> tuple[list[float], list[float]]:
    """Losses and times of the steps of our loop."""
    import numpy

    from streamsyn.sections import TrainSection
    from streamsyn.trainer.control import Order, Ranks, Step, Stop
    from streamsyn.trainer.examples import Example, Key
    from streamsyn.trainer.loop import Loop, Progress
    from streamsyn.trainer.loss import denominator, target_weights
    from streamsyn.trainer.model import model_dtype, place, read_model, start_accelerator

    per_step, gpu = plan["per_step"], plan["gpu"]
    section = TrainSection.model_validate(
        {"rows_per_step": per_step, "learning_rate": RATE, "betas": [0.9, 0.999], "loss": "token"}
    )
    accelerator = start_accelerator(section, per_step)
    model = read_model(str(folder), section, accelerator, None)
    if attention == "sdpa":
        model.set_attn_implementation("sdpa")
    placed = place(model, section, accelerator, model_dtype(str(folder)))
    store: Any = None  # nothing is saved
    loop = Loop(placed, Ranks(0, 1), section, 0, store, Progress())
    losses: list[float] = []
    times: list[float] = []

    def orders() -> Iterator[list[Order]]:
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
            some = tuple(rows[first : first + per_step])
            weights = tuple(target_weights(row, "token") for row in some)
            began = clock(gpu)
            yield [Step(some, weights, denominator(some, "token"), RATE)]
            times.append(clock(gpu) - began)
            losses.append(loop.progress.loss)
        yield [Stop()]

    loop.run(orders())
    return losses, times


def theirs(folder: Path, plan: dict[str, Any]) -> tuple[list[float], list[float]]:
    """The same of TRL's SFTTrainer, fed with the same packs as its own packing makes them."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

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
    times: list[float] = []
    losses: list[float] = []

    class Watch(TrainerCallback):
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            Watch.began = clock(plan["gpu"])

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(clock(plan["gpu"]) - Watch.began)

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
        gradient_checkpointing=False,
        bf16=plan["gpu"],
        use_cpu=not plan["gpu"],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=plan["gpu"],
    )
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Watch()],
    )
    trainer.train()
    return losses, times


def worker(side: str, folder: Path) -> None:
    """One round of one side; its figures go to stdout as JSON."""
    import torch

    plan = json.loads((folder / "plan.json").read_text())
    if not plan["gpu"]:
        torch.set_num_threads(1)
    name, _, attention = side.partition("-")
    losses, times = ours(folder, plan, attention) if name == "ours" else theirs(folder, plan)
    sys.stdout.write(json.dumps({"losses": losses, "times": times}) + "\n")


def round_of(side: str, python: str, folder: Path) -> dict[str, Any]:
    """Run a worker."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [python, "-m", "benchmarks.train", "--worker", side, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def prepare(folder: Path, steps: int, per_step: int, length: int | None) -> dict[str, Any]:
    """The model, a tokenizer and the packs, in `folder`."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    gpu = torch.cuda.is_available()
    length = length or (8192 if gpu else 1024)
    torch.manual_seed(0)
    config = model_config(gpu)
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    plain = Tokenizer(models.WordLevel({"a": 0, "<e>": 1}, "a"))
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<e>", pad_token="<e>").save_pretrained(folder)
    plan = {
        "rows": samples(steps * per_step, length),
        "per_step": per_step,
        "length": length,
        "vocabulary": config.vocab_size,
        "gpu": gpu,
        "weights": sum(one.numel() for one in model.parameters())
        - model.get_input_embeddings().weight.numel(),
        "attention": 12 * config.num_hidden_layers * config.hidden_size,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    return plan


def main() -> None:
    """Run what can be run, and say what came of it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--trl", metavar="PYTHON", help="a Python that has trl")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--steps", type=int, default=12)
    options.add_argument("--length", type=int, help="tokens of a row; by default 1024, on a GPU 8192")
    options.add_argument("--worker")
    options.add_argument("--folder", type=Path)
    given = options.parse_args()
    if given.worker:
        worker(given.worker, given.folder)
        return
    sides = {"ours-sdpa": sys.executable, "ours-segments": sys.executable}
    if given.trl:
        sides["trl"] = given.trl
    else:
        print("no --trl PYTHON: TRL's SFTTrainer would be fed the same packs, in turns with ours")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = prepare(folder, given.steps, 2, given.length)
        rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(given.rounds):
            for side, python in sides.items():
                rounds[side].append(round_of(side, python, folder))
    report(plan, rounds)


def report(plan: dict[str, Any], rounds: dict[str, list[dict[str, Any]]]) -> None:
    """A line for each side."""
    sizes = [size for row in plan["rows"][WARM_UP * plan["per_step"] :] for size, _ in row]
    work = 6 * plan["weights"] * sum(sizes) + plan["attention"] * sum(size**2 for size in sizes)
    fastest = {side: min(sum(one["times"][WARM_UP:]) for one in found) for side, found in rounds.items()}
    for side, took in fastest.items():
        losses = rounds[side][0]["losses"]
        line = f"{side:14} {sum(sizes) / took:9,.0f} tokens/s   loss {losses[0]:.4f} to {losses[-1]:.4f}"
        if "trl" in fastest:
            line += f"   {fastest['trl'] / took:.2f} times TRL"
        if plan["gpu"]:
            line += f"   {work / took / PEAK_FLOPS:.1%} of the peak"
        print(line)


if __name__ == "__main__":
    main()
